"""Repositories beyond a folder: copied into a cache by digest, and served from there as from any folder."""

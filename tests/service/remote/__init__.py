"""Repositories beyond a folder."""

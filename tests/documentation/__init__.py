"""Tests and generators of the documents: `docs/` as a site, its reference pages, and the commands that it shows."""

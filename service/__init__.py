"""Serve bundles over HTTP; `python -m service --help` is the manual. Needs neither torch nor timm."""

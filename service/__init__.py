"""Serve bundles over HTTP; `stridevit serve --help` is the manual. Needs neither torch nor timm."""

"""Train Vision Transformers whose keys and values are compressed; `stridevit --help` is the manual."""

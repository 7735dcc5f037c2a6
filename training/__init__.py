"""Train Vision Transformers whose keys and values are compressed; `python -m training --help` is the manual."""

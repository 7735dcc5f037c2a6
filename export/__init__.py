"""From a finished run to a bundle: plain ONNX, proven equal; `python -m export --help` is the manual."""

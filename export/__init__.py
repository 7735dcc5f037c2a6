"""From a finished run to a bundle: plain ONNX, proven equal; `stridevit export --help` is the manual."""

"""From a run to a bundle: plain ONNX, verified against the original; `stridevit export --help` is the manual."""

"""What this machine's processor can do."""

import platform

import pytest

from service.host import cpu_features

BYTES_SATURATE = platform.machine() == "x86_64" and "vnni" not in cpu_features()
"""Whether ONNX Runtime's 8-bit kernels may saturate, so that the service refuses models of int8."""
needs_exact_bytes = pytest.mark.skipif(BYTES_SATURATE, reason="8-bit kernels saturate on a CPU without VNNI")

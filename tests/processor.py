"""What this machine's processor can do."""

import pytest

from service.host import bytes_saturate

BYTES_SATURATE = bytes_saturate()
"""Whether the service refuses models of int8."""
needs_exact_bytes = pytest.mark.skipif(BYTES_SATURATE, reason="8-bit kernels saturate on a CPU without VNNI")

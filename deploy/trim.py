"""Remove from an environment what the service does not need at run time: `python deploy/trim.py SITE_PACKAGES`.

What is named here must exist, so that a new version of a package that moves it is noticed. `deploy/image-test.sh`
tests that what is left serves, and how large the image is. Standard library only.
"""

import shutil
import sys
from pathlib import Path

UNUSED = (
    "numpy/**/tests",
    "numpy/distutils",
    "numpy/f2py",
    "numpy/_core/include",
    "onnxruntime/transformers",
    "onnxruntime/quantization",
    "onnxruntime/tools",
    "**/*.pyi",
    "**/*.pyx",
    "**/*.pxd",
)
UNUSED_ON_A_CPU = ("onnxruntime/capi/libonnxruntime.so.*",)
"""For programs in C and C++: Python's module contains all of it. The image for GPUs keeps it, as that was not run."""


def trim(folder: Path) -> int:
    """Remove the files; returns the bytes that they took. Raises FileNotFoundError for a name that matches nothing."""
    patterns = UNUSED if any(folder.glob("onnxruntime_gpu-*.dist-info")) else UNUSED + UNUSED_ON_A_CPU
    freed = 0
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if not found:
            raise FileNotFoundError(f"{pattern} matches nothing in {folder}: change deploy/trim.py")
        for path in found:
            if path.is_dir():
                freed += sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                shutil.rmtree(path)
            elif path.exists():  # it may have gone with its folder
                freed += path.stat().st_size
                path.unlink()
    return freed


if __name__ == "__main__":
    print(f"{trim(Path(sys.argv[1])) / 1e6:.0f} MB of what the service does not need are removed")

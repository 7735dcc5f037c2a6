"""Tests, one folder per package. They neither fill the user's Hugging Face cache nor contact the hub."""

import os
import tempfile

# Here, before any test imports `datasets`, which reads its environment once.
_CACHE = tempfile.TemporaryDirectory(prefix="stridevit-tests-")
os.environ |= {"HF_HOME": _CACHE.name, "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

"""Copy the page's only library from what npm has installed by lock/page, and record what it is: `make vendor`.

python deploy/vendor.py .node/node_modules
"""

import hashlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
VENDOR = ROOT / "service" / "http" / "page" / "vendor"
LOCK = ROOT / "lock" / "page" / "package-lock.json"
FILES = {
    "dist/uPlot.iife.min.js": "uPlot.iife.min.js",
    "dist/uPlot.min.css": "uPlot.min.css",
    "LICENSE": "uPlot.LICENSE",
}


def main(modules: Path) -> None:
    """Copy the files, and write their digests beside them."""
    entry = json.loads(LOCK.read_text(encoding="utf-8"))["packages"]["node_modules/uplot"]
    VENDOR.mkdir(exist_ok=True)
    digests = {}
    for source, name in FILES.items():
        body = (modules / "uplot" / source).read_bytes()
        (VENDOR / name).write_bytes(body)
        digests[name] = hashlib.sha256(body).hexdigest()
    facts = {
        "name": "uplot",
        "version": entry["version"],
        "licence": entry["license"],
        "npm_integrity": entry["integrity"],
        "sha256": digests,
    }
    (VENDOR / "vendored.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(f"vendored uPlot {entry['version']} ({entry['license']})")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

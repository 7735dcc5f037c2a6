"""Ask a running service about a photo, an unknown model and bytes that are not an image. Standard library only.

python3 deploy/ask.py http://127.0.0.1:8000 photo.jpg
"""

import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

# A proxy from the environment must not come between this and a service on this machine.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def classify(url: str, body: bytes, query: str = "") -> tuple[int, Any]:
    """Status and JSON of an answer from /v1/classify."""
    request = urllib.request.Request(f"{url}/v1/classify{query}", data=body)  # noqa: S310 (the address that was given)
    try:
        with _DIRECT.open(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def expect(what: str, wanted: object, found: object, answer: object) -> None:
    """Print what was found; end with 1 if it is not what was wanted."""
    print(f"{what}: {found}")
    if found != wanted:
        sys.exit(f"{what} must give {wanted}: {answer}")


def main(url: str, photo: Path) -> None:
    """Print one line for each check; end with 1 at the first that fails."""
    status, answer = classify(url, photo.read_bytes())
    expect(f"{photo.name}, {photo.stat().st_size} bytes", 200, status, answer)
    predictions = answer["results"][0]["predictions"]
    expect("predictions", 5, len(predictions), answer)
    print(f"{answer['model']} says:", ", ".join(f"{one['label']} {one['probability']:.3f}" for one in predictions))
    expect("an unknown model", 404, *classify(url, b"any", "?model=no-such-model"))
    expect("bytes that are no image", 415, *classify(url, b"no image " * 100))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

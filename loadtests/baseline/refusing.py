"""A server that answers 429 to everything, to measure what refusing costs when nothing has to be decided.

    python loadtests/baseline/refusing.py --port 8001

Bare uvicorn without a framework. `stridevit loadtest overload` measures the CPU time of a refusal with it.
"""

import argparse
from typing import Any

import uvicorn

_BODY = b'{"status":429,"detail":"busy"}'


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answer `GET /readyz` with 200, and the rest with 429 once the body has arrived."""
    if scope["type"] != "http":
        return
    while scope["method"] == "POST" and (await receive()).get("more_body"):
        pass
    status = 200 if scope["path"] == "/readyz" else 429
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(_BODY)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": _BODY})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    uvicorn.run(app, port=parser.parse_args().port, log_level="warning", access_log=False, lifespan="off")

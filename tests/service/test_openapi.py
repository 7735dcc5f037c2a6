"""/openapi.json against other people's tools: a validator, schemathesis, and a client generated from it."""

import base64
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.keys import new_key
from tests.processes import ROOT, get, post, serving
from tests.service.conftest import PNG

# Two thousand requests by a tool that also computes: minutes on a busy machine.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
# The service is on this machine: not through the environment's proxies.
DIRECT = {**os.environ, "NO_PROXY": "*", "no_proxy": "*"}
EXAMPLES = 10
# Nobody reads what the service says while it is tested, and it is refused thousands of requests.
QUIET = {"STRIDEVIT_LOG_REQUESTS": "none"}


@pytest.fixture(scope="module")
def tools() -> Path:
    """The folder of the tools' commands, in an environment of their own: their versions would bind ours."""
    named = os.environ.get("STRIDEVIT_OPENAPI_TOOLS")
    if not named or not (Path(named) / "schemathesis").exists():
        pytest.skip("needs lock/client-openapi.txt installed: run `make test-all`, or set STRIDEVIT_OPENAPI_TOOLS")
    return Path(named)


@pytest.fixture(scope="module")
def url(repository: Path) -> Iterator[str]:
    """A service without keys."""
    with serving(repository, environment=QUIET) as (address, process):
        yield address
        assert process.poll() is None


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    """What a command says; fails the test with it if the command fails."""
    environment = {**DIRECT, "PATH": f"{path}:{os.environ['PATH']}"} if path else DIRECT
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-10_000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def schemathesis(tools: Path, url: str, folder: Path, *options: str) -> None:
    run(
        *(tools / "schemathesis", "--config-file", ROOT / "tests" / "clients" / "schemathesis.toml"),
        *("run", f"{url}/openapi.json", "--max-examples", str(EXAMPLES), "--seed", "1", "--no-color"),
        # On a busy machine answers may take long.
        *("--generation-database", "none", "--request-timeout", "120", *options),
        cwd=folder,
    )


def test_the_document_is_valid(tools: Path, url: str, tmp_path: Path) -> None:
    document = tmp_path / "openapi.json"
    document.write_bytes(get(f"{url}/openapi.json").content)
    run(tools / "openapi-spec-validator", document, cwd=tmp_path)


def test_schemathesis_finds_nothing_without_keys(tools: Path, url: str, tmp_path: Path) -> None:
    schemathesis(tools, url, tmp_path)


def test_schemathesis_finds_nothing_with_keys(tools: Path, repository: Path, tmp_path: Path) -> None:
    key, digest = new_key()
    with serving(repository, environment={**QUIET, "STRIDEVIT_API_KEY_HASHES": digest}) as (url, process):
        schemathesis(tools, url, tmp_path, "--header", f"Authorization: Bearer {key}")
        assert process.poll() is None


CLASSIFY = """
import io, json, sys
from client.api.v1 import classify, models
from client.api.v_2_open_inference_protocol import config, infer_of_version
from client.client import Client
from client.models import Classification, ImageForm, ImagesAsBase64, OipError, Problem
from client.models import InferenceRequest, InferenceResponse
from client.types import File

url, picture, base64 = sys.argv[1:]
client = Client(base_url=url, httpx_args={"trust_env": False})
data = open(picture, "rb").read()
bodies = (
    File(payload=io.BytesIO(data)),
    ImageForm(image=[File(payload=io.BytesIO(data), file_name="a.png")], top_k=5),
    ImagesAsBase64(image=base64),
)
answers = [classify.sync(client=client, body=body) for body in bodies]
assert all(isinstance(answer, Classification) for answer in answers), answers
assert len({str([p.to_dict() for p in answer.results[0].predictions]) for answer in answers}) == 1
one = classify.sync(client=client, body=ImagesAsBase64(image=base64, top_k=1))
assert len(one.results[0].predictions) == 1
refused = classify.sync(client=client, body=File(payload=io.BytesIO(b"text")))
assert isinstance(refused, Problem) and refused.status == 415, refused
name = models.sync(client=client).models[0].name
request = InferenceRequest.from_dict(
    {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [base64]}]}
)
given = infer_of_version.sync(name, "1", client=client, body=request)
assert isinstance(given, InferenceResponse), given
missing = config.sync("none", client=client)
assert isinstance(missing, OipError) and "none" in missing.error
print(json.dumps(answers[0].to_dict()))
"""


def test_a_client_generated_from_it_classifies_a_picture(tools: Path, url: str, tmp_path: Path) -> None:
    document, picture = tmp_path / "openapi.json", tmp_path / "picture.png"
    document.write_bytes(get(f"{url}/openapi.json").content)
    picture.write_bytes(PNG)
    client, settings = tmp_path / "client", tmp_path / "settings.json"
    # The generator does not know lines of JSON.
    settings.write_text(json.dumps({"content_type_overrides": {"application/x-ndjson": "text/plain"}}))
    generated = run(
        *(tools / "openapi-python-client", "generate", "--path", document, "--output-path", client),
        *("--config", settings, "--meta", "none", "--fail-on-warning"),
        cwd=tmp_path,
        path=tools,
    )
    operations = json.loads(document.read_text())["paths"].values()
    names = {operation["operationId"] for methods in operations for operation in methods.values()}
    assert {file.stem for file in client.glob("api/*/*.py") if file.stem != "__init__"} == names, generated
    script = tmp_path / "script.py"
    script.write_text(CLASSIFY)
    encoded = base64.b64encode(PNG).decode()
    answer = json.loads(run(tools / "python", script, url, picture, encoded, cwd=tmp_path))
    expected = post(f"{url}/v1/classify", PNG).json()
    assert answer["results"] == expected["results"]

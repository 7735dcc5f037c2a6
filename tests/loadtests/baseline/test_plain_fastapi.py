"""The plain server that `limit` measures answers as the service does."""

import sys
from pathlib import Path

import pytest

from loadtests.experiment.server import running, service_for
from tests.processes import ROOT, post
from tests.service.conftest import encoded, noise

PLAIN = ROOT / "loadtests" / "baseline" / "plain_fastapi.py"


def test_the_plain_server_answers_like_the_service(repository: Path, tmp_path: Path) -> None:
    name = "digits-csra-r2"
    command = [sys.executable, str(PLAIN), str(repository / name / "1"), "--port"]
    # The service lets libjpeg scale a large JPEG down before it resizes it: almost the same pixels.
    images = [
        (encoded(noise(seed=0)), 1e-5),
        (encoded(noise(320, 200, seed=1), "JPEG"), 0.01),
        (encoded(noise(33, 70, seed=2).convert("L")), 1e-5),
    ]
    with (
        service_for(name, repository=repository, log=tmp_path / "service.log") as service,
        running(command, name="the plain server", log=tmp_path / "plain.log") as plain,
    ):
        for image, tolerance in images:
            path = f"/v1/classify?model={name}"
            ours = post(service.url + path, image).json()["results"][0]["predictions"]
            theirs = post(plain.url + path, image).json()["results"][0]["predictions"]
            assert len(theirs) == 5
            assert theirs[0]["label"] == ours[0]["label"]
            assert theirs[0]["probability"] == pytest.approx(ours[0]["probability"], abs=tolerance)

"""Pictures for a service, so that the dashboard shows something: some deadlines are too short to be kept."""

import random
from pathlib import Path

from locust import FastHttpUser, between, task

_PICTURES = [file.read_bytes() for file in sorted(Path("/samples").glob("*.jpg"))]


class Visitor(FastHttpUser):
    """Somebody who sends a picture, looks at the answer, and sends the next."""

    wait_time = between(0.01, 0.2)

    @task(9)
    def in_time(self) -> None:
        """A picture for the family, which may answer with a cheaper model."""
        self._send("deadline_ms=500")

    @task(1)
    def too_soon(self) -> None:
        """A deadline that nothing can keep: it is refused at once."""
        self._send("deadline_ms=1")

    def _send(self, options: str) -> None:
        picture = random.choice(_PICTURES)  # noqa: S311 (no secret)
        path = f"/v1/classify?model=cifar100&{options}"
        with self.client.post(path, data=picture, name=f"/v1/classify?{options}", catch_response=True) as answer:  # type: ignore[arg-type]
            # Under load the service refuses (429) or is late (504), which is not a failure.
            if answer.status_code in {200, 429, 504}:
                answer.success()

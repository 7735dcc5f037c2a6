"""The service against the engine limit and a plain server: interleaved, each in a fresh process, by one generator.

Arms are the engine limit (decoding and engine without HTTP), the services, and the plain server
(loadtests/baseline/plain_fastapi.py). Servers get a closed loop at each number of connections; services then an open
loop at a fraction of what they have just reached.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from loadtests.experiment.engine_limit import TRIALS_SECONDS
from loadtests.experiment.model import Arm, Experiment, Load, Plan
from loadtests.experiment.schedule import Costs


@dataclass(frozen=True, kw_only=True)
class LimitPlan(Plan):
    """What is measured, and for how long."""

    connections: tuple[int, ...]
    """Ascending; the last one stands for saturation."""
    load_fraction: float
    """Rate of the open loop, as a fraction of the saturated throughput."""

    def loads(self, arm: Arm) -> list[Load]:
        """What each block of the arm applies."""
        if arm.kind == "engine":
            return []
        closed = [Load(name=closed_name(number), connections=number) for number in self.connections]
        if arm.kind == "plain":
            return closed
        return [*closed, Load(name=self.open_name, fraction=self.load_fraction, traced=True)]

    @property
    def open_name(self) -> str:
        """Name of the open loop."""
        return f"open loop at {self.load_fraction:.0%}"

    def estimated_seconds(self) -> float:
        """About how long it takes."""
        blocks = [
            self.seconds + TRIALS_SECONDS if arm.kind == "engine" else Costs().block(self, len(self.loads(arm)))
            for arm in self.arms
        ]
        return self.rounds * sum(blocks)


LimitExperiment = Experiment[LimitPlan]


def closed_name(connections: int) -> str:
    """Name of the closed loop with that many connections."""
    return f"{connections} connection{'s' * (connections > 1)}"


def with_references(services: Sequence[Arm]) -> tuple[Arm, ...]:
    """The services, and for each of their models the engine limit and the plain server."""
    arms = list(services)
    models = dict.fromkeys(arm.model for arm in services)
    for model in models:
        suffix = f" of {model}" if len(models) > 1 else ""
        arms.append(Arm(label=f"engine limit{suffix}", model=model, kind="engine"))
        arms.append(Arm(label=f"plain server{suffix}", model=model, kind="plain"))
    return tuple(arms)

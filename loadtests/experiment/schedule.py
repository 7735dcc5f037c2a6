"""In which order the blocks of an experiment run, how long they take, and how a plan is fitted to its budget."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from loadtests.experiment.capacity import PROBES
from loadtests.experiment.load_runner import BEYOND_SECONDS
from loadtests.experiment.model import LOADS, Arm, ComparisonPlan, Plan

SHORTEST_SECONDS = 3.0
LONGEST_SECONDS = 20.0
FEWEST_ROUNDS = 2


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a measurement takes besides its windows, in seconds; guesses until the arms have been tried."""

    server: float = 8.0
    """To start a server until it is ready, and to stop it."""
    generator: float = 2.5
    """To start and stop a generator."""
    probe: float = 0.0
    """The shortest probe of a capacity search that shows its percentile."""

    def load(self, plan: Plan) -> float:
        """One load."""
        return self.generator + plan.warmup_seconds + plan.seconds + BEYOND_SECONDS

    def block(self, plan: Plan, loads: int = len(LOADS)) -> float:
        """A block of that many loads."""
        return self.server + loads * self.load(plan)

    def search(self, plan: Plan) -> float:
        """One capacity search."""
        return self.server + PROBES * (self.load(plan) + max(0.0, self.probe - plan.seconds))

    def whole(self, plan: ComparisonPlan) -> float:
        """A whole comparison."""
        searches = plan.capacity_searches * len(without_repeats(plan)) * self.search(plan)
        return plan.rounds * len(plan.arms) * self.block(plan) + searches


def without_repeats(plan: Plan) -> list[Arm]:
    """The arms without the A/A arm."""
    return [arm for arm in plan.arms if arm.repeat_of is None]


def fitted(plan: ComparisonPlan, costs: Costs) -> ComparisonPlan:
    """The plan with windows as long as its budget allows, unless `seconds` is given (not 0); or with fewer rounds."""
    budget, fitting = plan.budget_minutes * 60, plan
    if not plan.seconds:
        # The cost of one more second in every window tells how many seconds fit.
        shortest = replace(plan, seconds=SHORTEST_SECONDS)
        at_least = costs.whole(shortest)
        each = costs.whole(replace(plan, seconds=SHORTEST_SECONDS + 1)) - at_least
        room = SHORTEST_SECONDS + (budget - at_least) / each
        fitting = replace(plan, seconds=float(math.floor(min(LONGEST_SECONDS, max(SHORTEST_SECONDS, room)) * 2) / 2))
    while costs.whole(fitting) > budget and fitting.rounds > FEWEST_ROUNDS:
        fitting = replace(fitting, rounds=fitting.rounds - 1)
    return fitting


def order(arms: Sequence[Arm], rounds: int, *, seed: int) -> list[tuple[int, Arm]]:
    """(round, arm) of every block: arms in a random order, then backwards (A B B A), then in another random order."""
    generator = np.random.default_rng(seed)
    blocks: list[tuple[int, Arm]] = []
    shuffled: list[Arm] = []
    for number in range(rounds):
        shuffled = [arms[index] for index in generator.permutation(len(arms))] if number % 2 == 0 else shuffled[::-1]
        blocks += [(number, arm) for arm in shuffled]
    return blocks

"""The open loop's rate over time, as a Locust load shape.

    locust -f loadtests/generator/locustfile.py,loadtests/generator/shapes.py --rates 200:30,900:10,200:30 ...

Rates are written as loadtests/generator/rates.py says: steps, ramps, spikes, a soak. The test ends with the last.
A rate is made of whole users: `--rate-per-user` is its step.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call"
from typing import Any

from locust import LoadTestShape, events
from locust.argument_parser import LocustArgumentParser

from loadtests.generator.rates import Part, parse_rates, rate_at


class Rates(LoadTestShape):
    """Turns `--rates` into a number of users."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: tuple[Part, ...] = ()

    def tick(self) -> tuple[int, float] | None:
        """Users, and how many may come or go in a second."""
        if self.runner is None:
            return None
        asked = self.runner.environment.parsed_options
        if asked is None or not asked.rates:
            raise ValueError("--rates is missing: RATE:SECONDS or FROM>TO:SECONDS, separated by commas")
        rate = rate_at(parse_rates(asked.rates), self.get_run_time())
        if rate is None:
            return None
        users = round(rate / asked.rate_per_user)
        return users, max(1, users, self.get_current_user_count())


@events.init_command_line_parser.add_listener
def _arguments(parser: LocustArgumentParser, **_: Any) -> None:
    parser.add_argument(
        "--rates",
        env_var="STRIDEVIT_LOAD_RATES",
        default="",
        help="rate over time: RATE:SECONDS or FROM>TO:SECONDS,...",
    )

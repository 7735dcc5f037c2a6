"""The open loop's rate over time, as a Locust load shape.

    locust -f loadtests/generator/locustfile.py,loadtests/generator/shapes.py --rates 200:30,900:10,200:30 ...

`--rates` is written as loadtests/generator/rates.py describes: steps, ramps, spikes, a soak. The test ends with the
last part. The number of users makes the rate, in steps of `--rate-per-user`.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-call"
from typing import Any

from locust import LoadTestShape, events
from locust.argument_parser import LocustArgumentParser

from loadtests.generator.rates import parse_rates, rate_at


class Rates(LoadTestShape):
    """Turns `--rates` into a number of users."""

    def tick(self) -> tuple[int, float] | None:
        """Number of users, and how many may start or stop in a second."""
        options = self.runner.environment.parsed_options if self.runner else None
        if options is None:
            return None
        if not options.rates:
            raise ValueError("--rates is missing: RATE:SECONDS or FROM>TO:SECONDS, separated by commas")
        rate = rate_at(parse_rates(options.rates), self.get_run_time())
        if rate is None:
            return None
        users = round(rate / options.rate_per_user)
        return users, max(1, users, self.get_current_user_count())


@events.init_command_line_parser.add_listener
def _arguments(parser: LocustArgumentParser, **_: Any) -> None:
    parser.add_argument(
        "--rates",
        env_var="STRIDEVIT_LOAD_RATES",
        default="",
        help="rate over time: RATE:SECONDS or FROM>TO:SECONDS,...",
    )

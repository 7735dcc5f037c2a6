"""The answers for all workers together: metrics and status."""

import asyncio
import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric

from service.errors import NotReady
from service.settings import Settings
from service.status import Report, written
from service.workers.front import Front
from service.workers.member import Member
from service.workers.merge import Totals, merged_status


class Answers:
    """The answers for all workers."""

    def __init__(self, members: Sequence[Member], totals: Totals, front: Front | None, settings: Settings) -> None:
        """`totals`: the counts of the workers that have ended."""
        self._members, self._totals, self._front, self._settings = members, totals, front, settings
        self._of_front = CollectorRegistry()
        if front:
            ProcessCollector(pid=lambda: front.pid, registry=self._of_front)
        self._started = time.monotonic()

    async def render_metrics(self, own: CollectorRegistry) -> bytes:
        """The metrics of all workers, the supervisor and the front."""
        await asyncio.gather(*(member.read_metrics() for member in self._members))
        more = await self._front_metrics()
        # Nothing is awaited from here on: a worker's counts are either among these or among the totals.
        found = {str(member.number): member.metrics for member in self._members if not member.settled}
        found["supervisor"] = generate_latest(own).decode()
        if self._front:
            found["front"] = generate_latest(self._of_front).decode()
        return self._totals.merged(found, [*self._own_metrics(), *more])

    def _own_metrics(self) -> Iterator[Metric]:
        states = GaugeMetricFamily("stridevit_workers", "Workers, by state.", labels=["state"])
        ready = sum(member.ready for member in self._members)
        states.add_metric(["ready"], ready)
        states.add_metric(["not-ready"], len(self._members) - ready)
        deaths = CounterMetricFamily("stridevit_worker_deaths", "Unexpected ends of a worker.", labels=["worker"])
        for member in self._members:
            deaths.add_metric([str(member.number)], member.deaths)
        yield from (states, deaths)

    async def _front_metrics(self) -> list[Metric]:
        if not self._front:
            return []
        counts = await self._front.counters()
        retries = CounterMetricFamily(
            "stridevit_front_retries",
            "Requests that the front sent again to another worker (sent), and those answered there (answered).",
            labels=["outcome"],
        )
        retries.add_metric(["sent"], counts.get("upstream_rq_retry", 0))
        retries.add_metric(["answered"], counts.get("upstream_rq_retry_success", 0))
        return [retries]

    async def render_status(self) -> bytes:
        """The status of all workers. Raises NotReady."""
        found = await asyncio.gather(*(member.status() for member in self._members if member.ready))
        reports = [Report.model_validate_json(text) for text in found if text]
        if not reports:
            raise NotReady("no worker answers: retry")
        uptime = time.monotonic() - self._started
        return written(merged_status(reports, self._totals, limit=self._settings.max_pending_images, uptime_s=uptime))

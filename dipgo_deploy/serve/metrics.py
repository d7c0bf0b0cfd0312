"""What a server counts, for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dipgo_deploy.serve.lane import BatchRecord, Lane

_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one server, by model. Their names begin with ``dipgo_``."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter(
            "dipgo_requests_total", "Requests for pictures.", ["model", "status"], registry=self.registry
        )
        self._pictures = Counter("dipgo_pictures_total", "Pictures drawn.", ["model"], registry=self.registry)
        self._batches = Counter("dipgo_batches_total", "Batches run.", ["model", "outcome"], registry=self.registry)
        self._waiting = Gauge("dipgo_waiting_pictures", "Pictures in the queue.", ["model"], registry=self.registry)
        self._filled = Histogram(
            "dipgo_batch_pictures",
            "Pictures of a batch.",
            ["model"],
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        self._waited = Histogram(
            "dipgo_waited_seconds", "A picture in the queue.", ["model"], buckets=_SECONDS, registry=self.registry
        )
        self._ran = Histogram(
            "dipgo_batch_seconds", "Drawing a batch.", ["model"], buckets=_SECONDS, registry=self.registry
        )

    def watch(self, lane: Lane) -> None:
        """Show how many wait in a lane."""
        self._waiting.labels(lane.name).set_function(lambda: lane.waiting)

    def batch(self, model: str, record: BatchRecord) -> None:
        """Count a batch."""
        self._batches.labels(model, record.outcome).inc()
        self._filled.labels(model).observe(len(record.waited))
        self._ran.labels(model).observe(record.seconds)
        for seconds in record.waited:
            self._waited.labels(model).observe(seconds)

    def answered(self, model: str, status: int, pictures: int) -> None:
        """Count a request. model: "" of one that names none that there is."""
        self._requests.labels(model, str(status)).inc()
        if pictures:
            self._pictures.labels(model).inc(pictures)

    def text(self) -> tuple[bytes, str]:
        """In Prometheus' format, and its media type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self.registry), CONTENT_TYPE_LATEST

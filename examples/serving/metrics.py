"""Counts of a server, in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from examples.serving.batches import Batches


class Metrics(Collector):
    """Requests by adapter ("": none that is known) and status, seconds until an answer, the state of the batches."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.registry = CollectorRegistry()
        self.registry.register(self)
        labels = ("adapter", "status")
        self.requests = Counter(
            "point_peft_requests", "Requests, by adapter and status.", labels, registry=self.registry
        )
        self.seconds = Histogram(
            "point_peft_request_seconds", "Seconds until a cloud was answered.", registry=self.registry
        )

    def text(self) -> bytes:
        """All of it, as it is now."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """The state of the batches and of the library, asked for when somebody wants to see it."""
        batches, library = self.batches, self.batches.status()
        yield CounterMetricFamily("point_peft_batches", "Batches that went through the model.", batches.batches)
        yield CounterMetricFamily("point_peft_batch_clouds", "Clouds in these batches.", batches.clouds)
        yield CounterMetricFamily("point_peft_adapter_loads", "Adapters read from their files.", library.loads)
        yield GaugeMetricFamily("point_peft_adapters_in_memory", "Adapters in the model.", len(library.adapters))
        yield GaugeMetricFamily("point_peft_adapter_bytes", "Bytes of these.", library.bytes)

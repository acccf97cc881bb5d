"""What a server counts, in the text format of Prometheus.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from itertools import accumulate

from point_peft import LibraryStatus

BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds that the buckets of the histogram end with; the last has no end."""


class Metrics:
    """Requests by adapter ("": none that is known) and status, and how long answers took."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.buckets = [0] * (len(BOUNDS) + 1)
        self.seconds = 0.0

    def count(self, adapter: str, status: int) -> None:
        """Count a request to /predict, or one that was refused."""
        self.requests[adapter, status] += 1

    def took(self, seconds: float) -> None:
        """Count an answer that took so long, waiting included."""
        self.buckets[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds

    def text(self, library: LibraryStatus, batches: int, clouds: int) -> str:
        """All of it, with the adapters in memory and the batches and clouds that went through the model."""
        ends = [*map(str, BOUNDS), "+Inf"]
        upto = list(accumulate(self.buckets))
        lines = [
            *_head("requests_total", "counter", "Requests, by adapter and status."),
            *(
                f'point_peft_requests_total{{adapter="{_escaped(adapter)}",status="{status}"}} {number}'
                for (adapter, status), number in sorted(self.requests.items())
            ),
            *_head("request_seconds", "histogram", "Seconds until a cloud was answered."),
            *(
                f'point_peft_request_seconds_bucket{{le="{end}"}} {number}'
                for end, number in zip(ends, upto, strict=True)
            ),
            f"point_peft_request_seconds_sum {self.seconds}",
            f"point_peft_request_seconds_count {upto[-1]}",
        ]
        for name, kind, about, value in (
            ("batches_total", "counter", "Batches that went through the model.", batches),
            ("batch_clouds_total", "counter", "Clouds in these batches.", clouds),
            ("adapters_in_memory", "gauge", "Adapters of the library that are in the model.", len(library.adapters)),
            ("adapter_bytes", "gauge", "Bytes of these.", library.bytes),
            ("adapter_loads_total", "counter", "Adapters that were read from their files.", library.loads),
        ):
            lines += [*_head(name, kind, about), f"point_peft_{name} {value}"]
        return "\n".join([*lines, ""])


def _head(name: str, kind: str, about: str) -> list[str]:
    return [f"# HELP point_peft_{name} {about}", f"# TYPE point_peft_{name} {kind}"]


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

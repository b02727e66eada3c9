"""StepHistogram: a Prometheus histogram that counts one value of many sequences at once.

prometheus_client's own Histogram takes one value a call. The engine's thread would call it once a sequence, 64 times in
a step of 64 sequences.
"""

import threading
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from math import inf

from prometheus_client.core import HistogramMetricFamily


class StepHistogram:
    """`buckets` are the upper bounds in ascending order, without infinity. Any thread may call all methods."""

    def __init__(self, name: str, documentation: str, buckets: Sequence[float]) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = [*map(float, buckets), inf]
        self._lock = threading.Lock()
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count `value`, `times` times."""
        bucket = bisect_left(self._bounds, value)
        with self._lock:
            self._counts[bucket] += times
            self._sum += value * times

    def family(self, labels: dict[str, str]) -> HistogramMetricFamily:
        """The state at this moment, for a collector."""
        with self._lock:
            counts = list(self._counts)
            total = self._sum
        family = HistogramMetricFamily(self._name, self._documentation, labels=list(labels))
        names = ["+Inf" if bound == inf else str(bound) for bound in self._bounds]
        family.add_metric(list(labels.values()), list(zip(names, accumulate(counts), strict=True)), total)
        return family

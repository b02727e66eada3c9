"""A short run of tests/soak.py. The long one is run by hand."""

from tests.soak import soak


def test_every_request_ends_and_nothing_grows() -> None:
    report = soak(requests=240, rounds=4, seed=1)
    assert report.problems == []
    assert report.counts["answered"] > 100
    assert min(report.counts[end] for end in ("failed by name", "aborted", "preemptions")) > 0

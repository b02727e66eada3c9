"""A short run of tests/soak_server.py. The long one is run by hand."""

from tests.soak_server import WAYS, soak_server


def test_mixed_requests_to_a_server() -> None:
    report = soak_server(requests=240, rounds=4, seed=1)
    assert report.problems == []
    assert all(report.counts[way] for way in WAYS)
    assert report.counts["HTTP requests"] > 240

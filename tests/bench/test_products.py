"""`bench products`: what is multiplied, how often, and what the table says."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atb_pllava.bench.products import layer_products, product_rows
from atb_pllava.bench.shapes import shape_config
from atb_pllava.cli.verbs import main
from atb_pllava.errors import ConfigError
from atb_pllava.ops.int8 import Int8Weight
from atb_pllava.ops.interface import CapturedGraph, Feature, Weight
from atb_pllava.ops.reference import TorchBackend
from tests.support import raw_config, run_main

PRODUCTS = {"out": (8, 64), "down": (8, 128)}


class Counting(TorchBackend):
    """Counts products by kind of weight and rows. With `captures`, a graph runs its step again."""

    def __init__(self, captures: bool) -> None:
        super().__init__()
        self.features = frozenset({Feature.GRAPH_CAPTURE} if captures else ())
        self.products: list[tuple[bool, int]] = []

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        self.products.append((isinstance(weight, Int8Weight), len(x)))
        return super().linear(x, weight, bias)

    def capture(self, step) -> CapturedGraph:  # type: ignore[no-untyped-def]
        class Again(CapturedGraph):
            def replay(self, context_lens) -> Tensor:  # type: ignore[no-untyped-def]
                return step()

            def free(self) -> None:
                """The step holds nothing of a device."""

        return Again()


def test_the_products_of_7b() -> None:
    assert layer_products(shape_config("7b").text) == {
        "qkv": (12288, 4096),
        "out": (4096, 4096),
        "gate_up": (22016, 4096),
        "down": (4096, 11008),
    }
    wide = layer_products(shape_config("34b").text)  # 8 key heads of 128 for 56 query heads
    assert wide["qkv"] == (7168 + 2 * 1024, 7168)


@pytest.mark.parametrize(("captures", "passes"), [(False, 1), (True, 10)])
def test_a_row_for_each_product_and_their_sum(captures: bool, passes: int) -> None:
    backend = Counting(captures)
    found = list(product_rows(backend, PRODUCTS, [1, 3], torch.float32, 64, rounds=2, cache_bytes=4096))
    assert [(row["product"], row["rows"]) for row in found] == [
        ("out", 1), ("out", 3), ("down", 1), ("down", 3), ("layer", 1), ("layer", 3)
    ]  # fmt: skip
    for row in found:
        parts = [r for r in found[:4] if row["product"] in ("layer", r["product"]) and r["rows"] == row["rows"]]
        weights = sum(PRODUCTS[r["product"]][0] * PRODUCTS[r["product"]][1] for r in parts)
        assert row["w8a16_ms"] == pytest.approx(sum(r["w8a16_ms"] for r in parts))
        assert row["float32_ms"] == pytest.approx(sum(r["float32_ms"] for r in parts))
        assert row["ratio"] == pytest.approx(row["float32_ms"] / row["w8a16_ms"])
        assert row["GB_per_s"] == pytest.approx(weights / row["w8a16_ms"] / 1e6)
    # 4096 bytes are 8 and 4 int8 weights, and two float ones at least. Three rounds, one of which is not counted, and a
    # pass before a capture.
    times = 3 * passes + captures
    assert backend.products.count((True, 3)) == times * (8 + 4)
    assert backend.products.count((False, 3)) == times * (2 + 2)


def test_groups_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="group_size is 128, and 64 columns"):
        next(product_rows(TorchBackend(), PRODUCTS, [1], torch.float32, 128, 1, 4096))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("atb_pllava.cli.bench.products.CACHE_BYTES", 4096)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(raw_config()))
    numbers = tmp_path / "numbers.json"
    options = ["--backend", "cpu", "--shape", str(config), "--rows", "1,2", "--rounds", "1", "--json", str(numbers)]
    status, out, err = run_main(capsys, main, "bench", "products", *options, "--dtype", "bfloat16")
    assert status == 0 and "2 rows, down: " in err
    header, _, *lines = out.splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        "rows", "product", "w8a16_ms", "bfloat16_ms", "ratio", "GB_per_s"
    ]  # fmt: skip
    expected = [(count, name) for count in (1, 2) for name in ("qkv", "out", "gate_up", "down", "layer")]
    assert [(row["rows"], row["product"]) for row in json.loads(numbers.read_text())] == expected
    assert len(lines) == len(expected)
    status, _, err = run_main(capsys, main, "bench", "products", "--rows", "2,1")
    assert status == 2 and "each larger than the one before" in err

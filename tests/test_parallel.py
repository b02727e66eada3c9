"""Tensor parallel: every size gives the answers of size 1, and no failure leaves anything behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from atb_pllava import LLM, BackendError, ConfigError, SamplingParams, WeightError
from atb_pllava.config import TextConfig
from atb_pllava.engine.step import StepInput, VideoPiece
from atb_pllava.parallel import Part, TensorParallel, check_world_size
from conftest import raw_config, write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
FRAMES = np.random.default_rng(3).integers(0, 255, (4, 60, 80, 3), dtype=np.uint8)
REQUESTS = [
    {"prompt": "USER:<image> what is it? ASSISTANT:", "frames": FRAMES},
    {"prompt": "USER: hello ASSISTANT:"},
    {"prompt": "USER:<image> or <image>? ASSISTANT:", "frames": [FRAMES, FRAMES[::-1].copy()]},
]
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=-1)


def followers() -> set[int]:
    """Processes that were started as ranks of this one."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if b"atb_pllava.workers" in (entry / "cmdline").read_bytes():
                    found.add(int(entry.name))
            except OSError:
                pass
    return found


@pytest.fixture(scope="module", params=["mha", "gqa"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 KV heads, MLP and vocabulary that no size divides."""
    heads = {"mha": 8, "gqa": 16}[request.param]
    raw = raw_config(num_attention_heads=heads, num_key_value_heads=8, head_dim=8, intermediate_size=101, vocab_size=307)
    return write_checkpoint(tmp_path_factory.mktemp(request.param), raw)


def load(path: Path, **options) -> LLM:
    return LLM(path, dtype="float32", backend="cpu", **options)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_every_size_gives_the_answers_of_size_1(model: Path, size: int) -> None:
    alone = load(model).generate(REQUESTS, GREEDY)
    with load(model, world_size=size, prefill_chunk=16, max_batch_size=2) as llm:
        together = llm.generate(REQUESTS, GREEDY)
        tokens = llm.encode_video(FRAMES)
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.token_ids == theirs.token_ids and ours.text == theirs.text
        for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4, rtol=0)
    torch.testing.assert_close(tokens, load(model).encode_video(FRAMES), atol=1e-4, rtol=1e-4)
    assert not followers()

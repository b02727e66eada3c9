"""The recorded results of the original PLLaVA code on tiny checkpoints."""

import json

import numpy as np
import pytest
import torch

from atb_pllava import LLM, SamplingParams
from tests.support import REFERENCE, SHARED_DATA, needs_reference

pytestmark = needs_reference


def _cases() -> dict[str, dict]:
    path = REFERENCE / "cases.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _video(case: dict) -> str:
    return str(SHARED_DATA / "videos" / ("yoga.mp4" if case["media"][0]["len"] == 300 else "jesse_dance.mp4"))


@pytest.fixture(scope="module")
def load():
    """One model in memory at a time: cases follow each other by checkpoint."""

    def make(case: dict, **options) -> LLM:
        directory = REFERENCE / "checkpoints"
        return LLM(
            directory / case["ckpt"],
            weight_dir=directory / case["weight_dir"] if case["weight_dir"] else None,
            lora_alpha=case["lora_alpha"],
            num_frames=case["num_frames"],
            pooling_shape=case["pooling_shape"],
            dtype="float32",
            backend="cpu",
            **options,
        )

    return make


@pytest.mark.parametrize("name", list(_cases()))
def test_recorded_case(load, name: str) -> None:
    case = _cases()[name]
    recorded = np.load(REFERENCE / f"{name}.npz")
    llm = load(case)
    video = _video(case)
    params = SamplingParams(max_tokens=case["gen"]["max_new_tokens"], logprobs=-1)
    out = llm.generate([{"prompt": case["prompt"], "video": video}], params)[0]

    assert out.frame_indices == case["media"][0]["frame_indices"]
    assert out.prompt_token_ids == case["input_ids"]
    assert out.metrics.prompt_tokens == case["merged_len"]

    tokens = llm.encode_video(video).numpy()
    shape = [int(n) for n in recorded["features_shape"]]
    assert list(tokens[None].shape) == shape
    step = -(-shape[1] // recorded["features"].shape[1])
    np.testing.assert_allclose(tokens[None][:, ::step], recorded["features"], atol=1e-4, rtol=0)

    expected = torch.from_numpy(recorded["prefill_logits_last"][0]).log_softmax(0).numpy()
    np.testing.assert_allclose(out.logprobs[0], expected, atol=1e-3, rtol=0)
    sure = next((i for i, gap in enumerate(case["top1_top2_gap"]) if gap < 2e-3), len(case["gen_ids"]))
    assert out.token_ids[:sure] == case["gen_ids"][:sure]
    if sure == len(case["gen_ids"]):
        assert out.text == case["answer_after_postprocess"]

"""The trained model of this repository answers new clips rightly, and uses time to do so."""

import json
import subprocess
import sys

import numpy as np

from atb_pllava import SamplingParams
from tests.support import ROOT, TINY, load_llm


def test_new_clips_are_answered_rightly() -> None:
    done = subprocess.run(
        [sys.executable, "examples/evaluate_tiny_pllava.py", "--count", "24", "--questions", "3", "--seed", "970000"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["choice"]["all"] >= 95 and report["caption"]["all"] >= 90
    assert report["direction"]["shuffled"] < 70 < 90 < report["direction"]["ordered"]


def test_the_same_frames_backwards_are_another_movement() -> None:
    llm = load_llm(TINY)
    frames = np.full((16, 112, 112, 3), 235, np.uint8)
    for i, frame in enumerate(frames):
        frame[46:70, 84 - 4 * i : 108 - 4 * i] = (220, 30, 30)  # a red square on its way to the left
    forth, back = (
        llm.chat(f, "Describe the video.", SamplingParams(max_tokens=32)).text for f in (frames, frames[::-1])
    )
    assert forth == "A red square moves to the left." and back == "A red square moves to the right."


def test_lora_alpha_matters() -> None:
    clip = str(ROOT / "examples" / "videos" / "red_circle_moves_left.mp4")
    weak = load_llm(TINY, lora_alpha=0.01)
    assert (
        weak.chat(clip, "Describe the video.", SamplingParams(max_tokens=32)).text != "A red circle moves to the left."
    )

"""Which frames are taken. The oracle is the original code's list of frame numbers."""

import json

import pytest

from atb_pllava.errors import VideoError
from atb_pllava.multimodal.frame_sampling import sample_frame_indices
from tests.support import REFERENCE, needs_reference


@needs_reference
def test_sampling_equals_the_original():
    rows = json.loads((REFERENCE / "sampling.json").read_text())
    for row in rows["chat"]:
        assert sample_frame_indices(row["num_frames"], row["num_segments"]) == row["idx"]
    for row in rows["eval"]:
        if row["first_idx"]:
            continue  # such rows are about folders of numbered pictures, which are not read
        start, end = row["bound"] or (None, None)
        bounds = {"fps": row["fps"], "start_seconds": start, "end_seconds": end}
        if max(row["idx"]) < row["len"]:
            assert sample_frame_indices(row["len"], row["num_segments"], "eval", **bounds) == row["idx"]
        else:  # start_seconds is behind the clip's end
            with pytest.raises(VideoError, match="no frame lies between"):
                sample_frame_indices(row["len"], row["num_segments"], "eval", **bounds)


@pytest.mark.parametrize("frame_sampler", ["demo", "eval", "npu"])
def test_samples_stay_inside(frame_sampler):
    for total in [*range(1, 70), 1000, 96_876]:
        for wanted in (1, 2, 3, 4, 8, 16, 32, 64):
            indices = sample_frame_indices(total, wanted, frame_sampler)
            assert len(indices) == wanted and indices == sorted(indices) and indices[0] >= 0 and indices[-1] < total


def test_npu_sampling():
    assert sample_frame_indices(5, 8, "npu") == [0, 0, 1, 1, 2, 3, 3, 4]
    with pytest.raises(VideoError, match="0 frames"):
        sample_frame_indices(0, 4)

"""Flags of captions: which texts get which."""

import pytest

from atb_pllava.batch.caption_flags import caption_flags, echoes_prompt, loops, speaks_of_image

GOOD = "A man in a red coat walks a dog along a beach. The dog runs into the water, then returns to the man."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, False),
        ("", False),
        ("No, no, no!", False),
        ("It goes up and down, up and down.", False),
        ("very very very very very very very very tall", True),
        ("He walks to the door, walks to the door, walks to the door", True),
        ("The cat sits down. A dog barks. The cat sits down. A bird sings. The cat sits down.", True),
        ("Yes. A dog barks loudly here. Yes. A bird sings. Yes.", False),
        ("猫在跑猫在跑猫在跑", True),
        ("一只猫在草地上奔跑,然后跳上了树。", False),
    ],
)
def test_loops(text: str, expected: bool) -> None:
    assert loops(text) is expected


@pytest.mark.parametrize("words", [1, 2, 3, 7, 40])
def test_a_phrase_of_any_length_up_to_40_words_is_found_after_other_words(words: int) -> None:
    phrase = " ".join(f"w{number}" for number in range(words))
    times = max(3, -(-8 // words))
    assert loops(f"{GOOD} {' '.join([phrase] * times)} end")
    assert not loops(f"{GOOD} {' '.join([phrase] * (times - 1))} end")


@pytest.mark.parametrize(
    ("text", "prompt", "expected"),
    [
        ("Describe the video in details. A dog runs.", "Describe the video in details.", True),
        ("describe the video, in details", "Describe the video in details.", True),
        ("The video shows details of a dog.", "Describe the video in details.", False),
        ("What?", "What?", False),  # too short to be an echo
        ("I go through the video carefully and I see", "Please go through the video carefully and tell all", False),
        ("go through the video carefully and tell all", "Please go through the video carefully and tell all", True),
    ],
)
def test_echoes_prompt(text: str, prompt: str, expected: bool) -> None:
    assert echoes_prompt(text, prompt) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The image shows a dog.", True),
        ("In this picture, a dog runs.", True),
        ("The images show dogs", True),
        ("The video shows a dog.", False),
        ("A man takes a picture of an image.", False),
        ("The imagery is dark.", False),
    ],
)
def test_speaks_of_image(text: str, expected: bool) -> None:
    assert speaks_of_image(text) is expected


@pytest.mark.parametrize(
    ("text", "reason", "flags"),
    [
        (GOOD, "stop", []),
        (GOOD, "length", ["cut_off"]),
        (" \n", "stop", ["empty"]),
        ("The image: Describe the video in details.", "length", ["cut_off", "echoes_prompt", "speaks_of_image"]),
    ],
)
def test_a_caption_has_all_its_flags_in_order(text: str, reason: str, flags: list[str]) -> None:
    assert caption_flags(text, reason, "Describe the video in details.") == flags

"""Settings of results: their digest, and their differences as a message names them."""

from atb_pllava.batch.settings import differences, settings_digest


def test_digest_depends_on_values_and_not_on_order() -> None:
    assert settings_digest({"a": 1, "b": [2]}) == settings_digest({"b": [2], "a": 1}) != settings_digest({"a": 1})


def test_differences_of_long_values_show_where_they_begin() -> None:
    prompt = "Describe the video in as many words as you can find, and leave nothing out. "
    (line,) = differences({"prompt": prompt + "Be kind."}, {"prompt": prompt + "Be brief."})
    assert "Be kind." in line and "Be brief." in line and len(line) < 100
    (line,) = differences({"weights": "a" * 64}, {"weights": "b" * 64})
    assert line == f'weights: "{"a" * 59}... -> "{"b" * 59}...'

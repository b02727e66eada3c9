"""The key of a medium follows its file."""

import os
from pathlib import Path

from atb_pllava.batch.result_key import Key, key_of, keys_of


def test_the_key_of_a_file_a_folder_and_nothing(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    os.utime(tmp_path / "x", ns=(0, 77))
    assert key_of("a", tmp_path / "x") == Key("a", 5, 77)
    (tmp_path / "link").symlink_to(tmp_path / "x")
    assert key_of("a", tmp_path / "link") == Key("a", 5, 77)
    assert key_of("a", tmp_path / "none") == key_of("a", "") == key_of("a", "a\0b") == Key("a")
    folder = tmp_path / "frames"
    folder.mkdir()
    for name in ("00001.jpg", "00002.jpg"):
        (folder / name).write_bytes(b"123")
        os.utime(folder / name, ns=(0, 10))
    os.utime(folder, ns=(0, 5))
    assert key_of("f", folder) == Key("f", 6, 10)
    os.utime(folder / "00002.jpg", ns=(0, 11))  # a file written anew does not touch the folder's time
    assert key_of("f", folder) == Key("f", 6, 11)
    assert keys_of([("1", folder), ("2", folder)], 2) == [Key("1", 6, 11), Key("2", 6, 11)]

"""Shards: the parts of an input for several machines that know nothing of each other."""

import hashlib
import re

from atb_pllava.errors import ConfigError, check_whole_number

_MOST_SHARDS = 100_000


def parse_shard(text: str) -> tuple[int, int]:
    """`"3/16"` as (3, 16). Raises ConfigError for anything else."""
    if not re.fullmatch("[0-9]{1,6}/[0-9]{1,6}", text):
        raise ConfigError(f"shard is {text!r}; it must be i/n, for example 3/16 for the third of 16 parts")
    number, total = map(int, text.split("/"))
    return check_shard(number, total)


def check_shard(number: int, total: int) -> tuple[int, int]:
    """The shard, if `number` is from 1 to `total`. Raises ConfigError otherwise."""
    check_whole_number("the number of shards", total, 1, _MOST_SHARDS)
    check_whole_number("the shard", number, 1, total, note=", and shards count from 1")
    return number, total


def is_in_shard(name: str, number: int, total: int) -> bool:
    """Whether the item with the id `name` is in shard `number` of `total`, `number` from 1.

    Every id is in exactly one shard: the one after the remainder of its hash, the first 8 bytes of SHA-256 as a
    big-endian number. Order and place of the input do not count.
    """
    digest = hashlib.sha256(name.encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") % total == number - 1

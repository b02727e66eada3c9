"""An unfinished conversion: its directory, its lock, and the record of the shards that are finished."""

import fcntl
import json
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atb_pllava.convert.safetensors_writer import checksum
from atb_pllava.errors import ConfigError, counted
from atb_pllava.files import read_config_json

logger = logging.getLogger(__name__)

RECORD = "conversion.json"


@dataclass(frozen=True)
class UnfinishedConversion:
    """The directory of a conversion in progress. `finished` has the CRC-32 of each finished shard, by file name."""

    directory: Path
    job: Mapping[str, Any]
    finished: dict[str, int]

    def mark_finished(self, file_name: str) -> None:
        """Record that a shard is complete."""
        self.finished[file_name] = checksum(self.directory / file_name)
        self.save()

    def save(self) -> None:
        """Write the record in place, because the lock is on this file. After a torn write all shards are made anew."""
        text = json.dumps({"job": self.job, "done": self.finished})
        (self.directory / RECORD).write_text(text, encoding="utf-8")


@contextmanager
def resume(directory: Path, job: Mapping[str, Any], kept: Collection[str]) -> Iterator[UnfinishedConversion]:
    """Make or reopen the directory of an unfinished conversion. One process at a time may hold it.

    `job` says what is converted. If the record is of the same job, finished shards that are intact and the files in
    `kept` stay. All other files are deleted. Raises ConfigError if another process holds the directory, and if it has
    files but no record, because such files are not ours.
    """
    record = directory / RECORD
    if directory.exists() and not record.is_file() and any(directory.iterdir()):
        raise ConfigError(f"{directory} is in the way and no unfinished conversion; move it, or name another -dst")
    directory.mkdir(parents=True, exist_ok=True)
    with open(record, "a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another conversion is writing {directory}; wait for it, or end it") from None
        yield _reopen(directory, job, kept)


def _reopen(directory: Path, job: Mapping[str, Any], kept: Collection[str]) -> UnfinishedConversion:
    try:
        record = read_config_json(directory / RECORD)
    except ConfigError:
        record = {}  # the process ended before it wrote a record
    is_same_job = record.get("job") == job
    recorded = record.get("done", {}) if is_same_job else {}
    finished = {name: crc for name, crc in recorded.items() if _is_intact(directory / name, crc)}
    stay = {RECORD, *finished, *(kept if is_same_job else ())}
    for file in directory.iterdir():
        if file.name not in stay:
            file.unlink()
    if finished:
        logger.info("going on in %s: %s done and intact", directory, counted(len(finished), "shard"))
    conversion = UnfinishedConversion(directory, job, finished)
    conversion.save()
    return conversion


def _is_intact(file: Path, crc: int) -> bool:
    return file.is_file() and checksum(file) == crc

"""`caption --dry_run`: what is in the input, by the headers of its files, and the time that a run would take.

The time is that of a few videos of the input, captioned with the same options into a file that is dropped.
"""

import random
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from atb_pllava.batch.caption_item import CaptionItem
from atb_pllava.batch.captioner import Captioner
from atb_pllava.batch.captioning import CaptionCounts, CaptionRun
from atb_pllava.batch.progress import Progress
from atb_pllava.batch.result_log import ResultLog
from atb_pllava.batch.survey import survey
from atb_pllava.cli.caption_job import CaptionJob
from atb_pllava.cli.captioners import captioner_of
from atb_pllava.errors import counted, duration

_MOST_NAMED = 10  # unreadable files
_FEWEST_SAMPLES = 8


def dry_run(job: CaptionJob) -> int:
    """Print the survey, the unreadable files and the estimated time on stdout. Nothing is kept. Returns 0.

    Without a model or a server there is no estimate.
    """
    quiet = job.arguments.quiet
    found = survey(job.videos.items(), None, job.videos.limits, quiet=quiet)
    print(found.summary())
    for row in found.unreadable[:_MOST_NAMED]:
        print(f"  {row.kind}: {row.message}")
    if len(found.unreadable) > _MOST_NAMED:
        print(f"  and {len(found.unreadable) - _MOST_NAMED} more")
    unreadable = {row.id for row in found.unreadable}
    if len(unreadable) < found.items and (job.arguments.model_path is not None or job.arguments.server):
        print(_estimate(job, unreadable))
    return 0


def _estimate(job: CaptionJob, unreadable: set[str]) -> str:
    """The line about the time for all readable items, after a sample of them was captioned."""
    rows = 0

    def readable() -> Iterator[CaptionItem]:
        nonlocal rows
        for item in job.videos.items():
            if item.id not in unreadable:
                rows += job.rows_of(item)
                yield item

    with captioner_of(job) as (captioner, _, _):
        size = max(captioner.concurrency, _FEWEST_SAMPLES)
        sample = _sample(readable(), size)
        began = time.perf_counter()
        counts = _caption(captioner, sample, job)
        seconds = time.perf_counter() - began
    asked = counts.answered + counts.failed.total()
    whole = duration(seconds * rows / asked)
    note = f", {counts.failed.total()} of them failed" if counts.failed else ""
    return f"about {whole} for {counted(rows, 'row')}: {counted(asked, 'row')} of a sample took {seconds:.1f} s{note}"


def _caption(captioner: Captioner, sample: list[CaptionItem], job: CaptionJob) -> CaptionCounts:
    with tempfile.TemporaryDirectory() as folder, ResultLog(Path(folder) / "sample.jsonl") as log:
        log.begin({})
        progress = Progress("sample", None, quiet=True)
        return CaptionRun(captioner, sample, job.prompts, log, progress).run()


def _sample(items: Iterable[CaptionItem], size: int) -> list[CaptionItem]:
    """`size` random items, or all if there are fewer. Each item has the same chance (Vitter's algorithm R)."""
    chance = random.Random(0)
    sample: list[CaptionItem] = []
    for number, item in enumerate(items):
        if number < size:
            sample.append(item)
        else:
            place = chance.randrange(number + 1)
            if place < size:
                sample[place] = item
    return sample

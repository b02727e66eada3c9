"""RayCaptionRun: captions by actors of a Ray cluster, collected by this process in one result log.

Ray Data moves the items to the actors and the rows back. A block of items is one task of an actor, and Ray runs the
task again when the actor dies. The rows of a block come all at once, after its last answer.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ray.data
from ray.exceptions import RayError

from atb_pllava.batch.caption_item import CaptionItem
from atb_pllava.batch.caption_row import questions_of
from atb_pllava.batch.captioning import CaptionCounts, new_questions
from atb_pllava.batch.log_line import Row
from atb_pllava.batch.progress import Progress
from atb_pllava.batch.ray_actor import ActorModel, CaptionActor, encode_task
from atb_pllava.batch.ray_cluster import ActorPool
from atb_pllava.batch.result_key import Key
from atb_pllava.batch.result_log import KEY_FIELDS, ResultLog
from atb_pllava.batch.settings import check_settings, differences
from atb_pllava.errors import BackendError, counted

_BATCHES_OF_BLOCK = 8  # the engine is not full at the end of a block, so a block is many of its batches
_BLOCKS_OF_ACTOR = 4  # of a small input each actor gets at least so many blocks, so that no actor waits for long


class RayCaptionRun:
    """One run over `items`. This process is connected to a cluster and has opened the log.

    asked: the settings beside the model's. planned: the settings that are known without the model, against which the
    log was checked; None means that no row of the log counts. Other rows are left out as in `CaptionRun`. Two
    questions with the same frames and prompt are asked once if they are in one block.
    """

    def __init__(
        self,
        model: ActorModel,
        pool: ActorPool,
        asked: Mapping[str, Any],
        log: ResultLog,
        progress: Progress,
        planned: Mapping[str, Any] | None = None,
        retry_errors: bool = False,
    ) -> None:
        self.counts = CaptionCounts()
        self._model = model
        self._pool = pool
        self._asked = asked
        self._log = log
        self._progress = progress
        self._retry_errors = retry_errors
        self._planned = planned
        self._pending: dict[tuple[str, str], Key] = {}  # by id and name of the prompt

    def run(self, items: Iterable[CaptionItem]) -> CaptionCounts:
        """Answer all questions. After an exception, the rows of finished blocks are in the log.

        Raises ConfigError when the model has other settings than the log, or the log cannot be written. Raises
        BackendError when an actor cannot load the model, or Ray gives up.
        """
        has_begun = self._go_on()
        tasks = self._tasks(items, has_begun)
        if not tasks:
            return self.counts
        try:
            for result in self._results(tasks):
                if "failure" in result:
                    raise BackendError(f"an actor cannot answer: {result['failure']}")
                self._check({**result["settings"], **self._asked}, has_begun)
                has_begun = True
                for row in result["rows"]:
                    self._write(row)
                self._log.sync()
        except RayError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise BackendError(f"Ray gave up: {lines[-1].strip()}; the same command goes on") from error
        if self._pending:
            raise BackendError(f"Ray ended without {counted(len(self._pending), 'row')}; the same command goes on")
        return self.counts

    def _go_on(self) -> bool:
        """Begin the log with the settings that it has, unless they are other ones. Says whether the log has begun."""
        last = self._log.last_settings
        if last is None or self._planned is None:
            return False
        if differences({name: last[name] for name in self._planned if name in last}, self._planned):
            return False  # the log has no answers, else it would have been refused
        self._log.begin(last)
        return True

    def _tasks(self, items: Iterable[CaptionItem], has_begun: bool) -> list[Mapping[str, str]]:
        """The items that have questions to be asked, as rows of a dataset. All are kept in memory."""
        tasks: list[Mapping[str, str]] = []
        folders: dict[str, str] = {}  # of `questions_of`
        for item in items:
            questions = questions_of(item, list(self._model.prompts), folders)
            new = questions
            if has_begun:
                new = new_questions(questions, self._log, self.counts, self._retry_errors)
                self._progress.skip(len(questions) - len(new))
            if new:
                names = [question.prompt.name for question in new]
                self._pending.update({(item.id, question.prompt.name): question.key for question in new})
                tasks.append({"task": encode_task(item, names)})
        return tasks

    def _results(self, tasks: list[Mapping[str, str]]) -> Iterator[Mapping[str, Any]]:
        """What the actors return, a block at a time, in the order in which the blocks end."""
        most = _BATCHES_OF_BLOCK * self._model.args.engine.max_batch_size
        blocks = max(-(-len(tasks) // most), min(len(tasks), _BLOCKS_OF_ACTOR * self._pool.size))
        dataset = ray.data.from_items(tasks, override_num_blocks=blocks).map_batches(
            CaptionActor,
            fn_constructor_args=(self._model,),
            batch_size=None,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=self._pool.size),
            **self._pool.options,
        )
        for batch in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
            yield from map(json.loads, batch["result"])

    def _check(self, settings: Mapping[str, Any], has_begun: bool) -> None:
        """Begin the log with the settings of the first block. All others must have the same."""
        if not has_begun:
            self._log.begin(settings, overwrite=self._planned is None)
            return
        assert self._log.last_settings is not None
        check_settings(self._log.path, self._log.last_settings, settings, self._log.remedy)

    def _write(self, full: Row) -> None:
        key = self._pending.pop((full["id"], full["prompt"]), None)
        if key is None:  # Ray had the block answered twice
            return
        row = {name: value for name, value in full.items() if name not in KEY_FIELDS}
        self._log.add(key, row, wait=False)
        self.counts.add(row)
        self._progress.add("error" in row, kind=row.get("kind"))

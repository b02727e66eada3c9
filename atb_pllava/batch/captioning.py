"""CaptionRun: asks prompts about many videos and appends a row to a result log as soon as an answer is there."""

import queue
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from atb_pllava.batch.caption_item import CaptionItem
from atb_pllava.batch.caption_prompts import Prompt
from atb_pllava.batch.caption_row import Question, caption_of, caption_row, failed_row, model_input, questions_of
from atb_pllava.batch.captioner import Caption, Captioner, NoCaptionerError, OpenVideo
from atb_pllava.batch.log_line import Row
from atb_pllava.batch.progress import Progress
from atb_pllava.batch.result_key import Key
from atb_pllava.batch.result_log import ResultLog
from atb_pllava.errors import PllavaError

_SECONDS_BETWEEN_SYNCS = 1.0  # a power failure loses the rows of at most so long; a killed process loses none


@dataclass
class CaptionCounts:
    """Rows by what became of them. `known` rows are those of earlier runs, `known_failed` among them have an error."""

    answered: int = 0
    copied: int = 0
    failed: Counter[str] = field(default_factory=Counter)  # by kind
    flagged: Counter[str] = field(default_factory=Counter)  # by flag
    known: int = 0
    known_failed: int = 0
    tokens: int = 0

    @property
    def all_failed(self) -> int:
        """Rows without an answer, those of earlier runs included."""
        return self.failed.total() + self.known_failed

    def add(self, row: Row) -> None:
        """Count a new row."""
        if "error" in row:
            self.failed[row["kind"]] += 1
            return
        self.answered += 1
        self.copied += "copied_from" in row
        self.flagged.update(row["flags"])
        self.tokens += 0 if "copied_from" in row else row["tokens"]


def new_questions(
    questions: Sequence[Question],
    log: ResultLog,
    counts: CaptionCounts,
    retry_errors: bool,
    asked: Collection[Key] = (),
) -> list[Question]:
    """The questions about one item that are to be asked now. The others are counted as known.

    An error in the log is a row, unless `retry_errors`. asked: the keys that are under way.
    """
    log.settle([question.key for question in questions], wait=False)
    new = []
    for question in questions:
        if question.key in log or question.key in asked:
            continue
        if log.has_error(question.key) and not retry_errors:
            counts.known_failed += 1
        else:
            new.append(question)
    counts.known += len(questions) - len(new)
    return new


class CaptionRun:
    """One run over `items`. The log has begun with the run's settings.

    Threads open videos and ask. The thread that calls `run` writes the rows. Questions with a row in the log are not
    asked. An error counts as a row unless `retry_errors` is given. Two questions with the same frames and prompt are
    asked once, also in different runs.
    """

    def __init__(
        self,
        captioner: Captioner,
        items: Iterable[CaptionItem],
        prompts: list[Prompt],
        log: ResultLog,
        progress: Progress,
        retry_errors: bool = False,
    ) -> None:
        self.counts = CaptionCounts()
        self._captioner = captioner
        self._log = log
        self._log_lock = threading.Lock()
        self._progress = progress
        self._jobs = self._unanswered(items, prompts, retry_errors)
        self._jobs_lock = threading.Lock()
        self._asked: set[Key] = set()  # under way, or failed in this run
        self._answers: dict[str, Future[Caption | None]] = {}  # by model input, until the row is in the log
        self._leaders: dict[str, str] = {}  # ids of the questions that `_answers` are asked for
        self._rows: queue.SimpleQueue[tuple[Question, Row] | BaseException | None] = queue.SimpleQueue()
        self._stop = threading.Event()

    def run(self) -> CaptionCounts:
        """Answer all questions. After an exception, the rows of finished answers are in the log.

        Raises NoCaptionerError when nothing is left that answers, and ConfigError when the log cannot be written.
        """
        threads = [
            threading.Thread(target=self._work, name=f"caption {number}", daemon=True)
            for number in range(self._captioner.concurrency)
        ]
        for thread in threads:
            thread.start()
        running = len(threads)
        synced = began = time.monotonic()
        try:
            while running:
                result = self._rows.get()
                if result is None:
                    running -= 1
                elif isinstance(result, BaseException):
                    raise result
                else:
                    self._write(*result)
                now = time.monotonic()
                self._progress.note = self._note(max(now - began, 1e-9))
                if now - synced >= _SECONDS_BETWEEN_SYNCS:
                    self._log.sync()
                    synced = now
        finally:
            self._stop.set()
            self._write_finished()
        self._log.sync()
        return self.counts

    # The caller's thread

    def _write(self, question: Question, row: Row) -> None:
        with self._log_lock:
            self._log.add(question.key, row, wait=False)
            answer = row.get("model_input")
            if answer is not None and "copied_from" not in row:
                self._answers.pop(answer, None)  # the log has it now
                self._leaders.pop(answer, None)
            if "error" not in row:
                self._asked.discard(question.key)
        self.counts.add(row)
        self._progress.add("error" in row, _name(question), row.get("kind"))

    def _write_finished(self) -> None:
        """Write the rows that wait in the queue when the run is interrupted."""
        while True:
            try:
                result = self._rows.get_nowait()
            except queue.Empty:
                return
            if isinstance(result, tuple):
                self._write(*result)

    def _note(self, seconds: float) -> str:
        """`1200 tokens/s, waiting for video 12 %`, for the progress line."""
        waited = self._captioner.seconds_without_work()
        waiting = "" if waited is None else f", waiting for video {100 * waited / seconds:.0f} %"
        return f"{self.counts.tokens / seconds:.0f} tokens/s{waiting}"

    # The threads that ask

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                with self._jobs_lock:
                    questions = next(self._jobs, None)
                if questions is None:
                    break
                self._answer(questions)
            self._rows.put(None)
        except BaseException as error:
            self._rows.put(error)

    def _unanswered(
        self, items: Iterable[CaptionItem], prompts: list[Prompt], retry_errors: bool
    ) -> Iterator[list[Question]]:
        """The questions of each item that are to be asked now."""
        folders: dict[str, str] = {}
        for item in items:
            questions = questions_of(item, prompts, folders)
            with self._log_lock:
                new = new_questions(questions, self._log, self.counts, retry_errors, self._asked)
                self._asked.update(question.key for question in new)
            self._progress.skip(len(questions) - len(new))
            if new:
                yield new

    def _answer(self, questions: list[Question]) -> None:
        """Ask all questions about one item, one after another: the later ones find its frames encoded."""
        item = questions[0].item
        began = time.perf_counter()
        for question in questions:
            self._progress.begin(_name(question))
        left = list(questions)
        try:
            with self._captioner.open(item.path, (item.start_seconds, item.end_seconds)) as video:
                while left and not self._stop.is_set():
                    self._answer_one(left[0], video, began)
                    del left[0]
                    began = time.perf_counter()
        except NoCaptionerError:
            raise
        except PllavaError as error:
            for question in left:
                self._rows.put((question, failed_row(question, error, time.perf_counter() - began)))

    def _answer_one(self, question: Question, video: OpenVideo, began: float) -> None:
        try:
            caption, copied_from = self._caption(question, video)
        except NoCaptionerError:
            raise
        except PllavaError as error:
            row = failed_row(question, error, time.perf_counter() - began)
        else:
            row = caption_row(question, video, caption, time.perf_counter() - began, copied_from)
        self._rows.put((question, row))

    def _caption(self, question: Question, video: OpenVideo) -> tuple[Caption, str | None]:
        """The answer, and the id of the row that it is copied from. None: it was asked for."""
        asked = model_input(video, question.prompt)
        while True:
            with self._log_lock:
                known = self._log.answer_to(asked)
                if known is not None:
                    return caption_of(known), known.get("copied_from", known["id"])
                pending = self._answers.get(asked)
                if pending is None:
                    own: Future[Caption | None] = Future()
                    self._answers[asked] = own
                    self._leaders[asked] = question.key.id
                    break
                leader = self._leaders[asked]
            caption = pending.result()
            if caption is not None:
                return caption, leader
        try:
            caption = self._captioner.ask(video, question.prompt.text, _name(question))
        except BaseException:
            with self._log_lock:
                self._answers.pop(asked, None)
            own.set_result(None)  # whoever waits asks for itself
            raise
        own.set_result(caption)
        return caption, None


def _name(question: Question) -> str:
    """What progress lines call a question."""
    return f"{question.key.id} ({question.prompt.name})" if question.prompt.name != "1" else question.key.id

"""Ask many requests and keep each answer in a result log. Requests with an answer in the log are not asked again."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from atb_pllava.batch.log_line import Row
from atb_pllava.batch.progress import Progress
from atb_pllava.batch.result_key import Key
from atb_pllava.batch.result_log import ResultLog
from atb_pllava.engine.outputs import RequestOutput
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.errors import BackendError, ConfigError, PllavaError, RequestError, VideoError, counted
from atb_pllava.llm import LLM

KINDS: dict[type[PllavaError], str] = {VideoError: "media", RequestError: "request", BackendError: "backend"}
_MOST_NAMED = 3  # changed files that a message names


def answer_row(name: str, answer: RequestOutput) -> Row:
    """The default row of an answer."""
    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "frame_indices": answer.frame_indices,
    }


def error_row(error: PllavaError) -> Row:
    """The row of an error: its message, and its kind as a stable word."""
    kinds = [kind for known, kind in KINDS.items() if isinstance(error, known)]
    return {"error": str(error), "kind": kinds[0] if kinds else "other"}


def answer_all(
    llm: LLM,
    keys: Sequence[Key],
    request_of: Callable[[str], Mapping[str, Any]],
    params: SamplingParams,
    log: ResultLog,
    row_of: Callable[[str, RequestOutput], Row] = answer_row,
    what: str = "answers",
    quiet: bool = False,
) -> None:
    """Ask every key that has no answer in the log, in batches. Then `log.row` of each key is an answer or an error.

    `request_of(id)` makes a request of `LLM.generate` when it is that request's turn. A PllavaError of `request_of` or
    of the request becomes a row with "error", and the run goes on. An interrupt loses only the requests under way.
    `what` names the answers in the progress lines. `quiet` silences the progress lines. Raises ConfigError for an id
    that occurs twice.
    """
    if len({key.id for key in keys}) != len(keys):
        twice = len(keys) - len({key.id for key in keys})
        raise ConfigError(f"{counted(twice, 'question id')} of {what} occur{'s' * (twice == 1)} more than once")
    log.settle(keys)
    unanswered = {key.id: key for key in keys if key not in log}
    progress = Progress(what, len(keys), len(keys) - len(unanswered), quiet)
    _say_changed(unanswered, log, progress)
    asked: list[str] = []

    def keep(name: str, row: Row) -> None:
        log.add(unanswered[name], row)
        progress.add("error" in row, name, row.get("kind"))

    def requests() -> Iterator[Mapping[str, Any]]:
        for name in unanswered:
            progress.begin(name)
            try:
                request = request_of(name)
            except PllavaError as error:
                keep(name, error_row(error))
                continue
            asked.append(name)
            yield {"id": name, **request}

    with progress:
        for number, answer in llm.generate_iter(requests(), params):
            name = asked[number]
            keep(name, error_row(answer) if isinstance(answer, PllavaError) else row_of(name, answer))
    progress.finish()


def _say_changed(unanswered: Mapping[str, Key], log: ResultLog, progress: Progress) -> None:
    """Print the files that are asked about although the log has an answer under their id, and the reason."""
    places = log.answered_places() if unanswered else {}
    changed = []
    elsewhere = []
    for name, key in unanswered.items():
        if log.is_of_another_file(key):
            elsewhere.append(name)
        elif any(key.may_have_been_at(place) for place in places.get(name, ())):
            changed.append(name)
    for names, why in (
        (changed, "asked again, as the file has another size or time than when it was answered"),
        (elsewhere, "asked, as the answer there is about a file of another folder with the same name, size and time"),
    ):
        if names:
            more = ", ..." if len(names) > _MOST_NAMED else ""
            progress.say(f"{why}: {', '.join(names[:_MOST_NAMED])}{more}")

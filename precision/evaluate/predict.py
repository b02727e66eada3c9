"""Ask a model all questions of a benchmark. Questions about one video follow each other."""

from collections.abc import Mapping, Sequence
from typing import Any

from atb_pllava import LLM, RequestOutput, SamplingParams
from atb_pllava.batch.answering import answer_all
from atb_pllava.batch.log_line import Row
from atb_pllava.batch.result_key import keys_of
from atb_pllava.batch.result_log import ResultLog
from atb_pllava.errors import RequestError
from precision.evaluate.clips import ClipReader, media_of
from precision.evaluate.questions import ClipName, Question


def predict(
    llm: LLM,
    questions: Sequence[Question],
    params: SamplingParams,
    log: ResultLog,
    prefix: str | None,
    what: str,
    quiet: bool = False,
) -> dict[str, Row]:
    """Rows by the questions' names: {"pred": text after the answer prefix, ...}, or {"error": text}.

    A question that the log has an answer for is asked again only when its video has changed. `prefix` is the answer
    prefix (None: the conversation's own). `what` names the benchmark in the progress lines.
    """
    files = [(question.name, question.video) for question in questions]
    keys = {key.id: key for key in keys_of(files, len(files), quiet)}
    known = [key for key in keys.values() if key in log]
    ordered = grouped([question for question in questions if keys[question.name] not in log])
    reader = ClipReader(llm.processor, ordered)
    by_name = {question.name: question for question in questions}
    frames: dict[str, list[int]] = {}

    def request_of(name: str) -> Mapping[str, Any]:
        question = by_name[name]
        if question.problem is not None:
            raise RequestError(question.problem)
        clip = reader.clip(question)
        frames[name] = list(clip.frame_indices)
        return {"question": question.text, "answer_prefix": prefix, **media_of(clip)}

    def row_of(name: str, answer: RequestOutput) -> Row:
        return {
            "pred": continuation(llm, answer),
            "tokens": len(answer.token_ids),
            "finish_reason": answer.finish_reason,
            "frame_indices": frames.pop(name),
        }

    try:
        answer_all(
            llm, [*known, *(keys[question.name] for question in ordered)], request_of, params, log, row_of, what, quiet
        )
    finally:
        reader.close()
    return {name: log.row(key) or {} for name, key in keys.items()}


def grouped(questions: Sequence[Question]) -> list[Question]:
    """The questions sorted by clip. Clips are in the order of their first question."""
    place: dict[ClipName, int] = {}
    for question in questions:
        place.setdefault(question.clip, len(place))
    return sorted(questions, key=lambda question: place[question.clip])


def continuation(llm: LLM, answer: RequestOutput) -> str:
    """The generated text with its leading blanks, which MVBench's letter matching sees. `answer.text` has none."""
    before = llm.tokenizer.decode(answer.prompt_token_ids)
    return llm.tokenizer.decode([*answer.prompt_token_ids, *answer.token_ids])[len(before) :].rstrip()

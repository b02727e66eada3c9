"""Ask a model the questions of Video-Bench's sets. run_pa_videobench.sh and run_pa_videobench_gpu.sh call this file.

    python precision/videobench/answer_questions.py --model_path examples/tiny_pllava --dataset_name sampling_data \\
        --Eval_QA_root egs/Video-Bench --Eval_Video_root egs/VideoBench --chat_conversation_output_folder Chat_results

writes <set>_eval.json for each set: {id: {"video_id", "question", "output_sequence": [text], "time", "dataset"}}. The
time is in seconds. The row of a question that failed has an "error" and an empty text.

Every answer is appended to <set>_eval.log.jsonl at once. After a kill the same command goes on. Questions that failed
or whose video has changed are asked again. <set>_eval.json.manifest.json has the model and settings of the answers.
Results of other settings are replaced only with --overwrite.
"""

import argparse
import hashlib
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the packages need not be installed

from atb_pllava.doctor.required_packages import require_packages

if __name__ == "__main__":
    require_packages()

from atb_pllava.batch.answering import answer_all
from atb_pllava.batch.log_line import Row
from atb_pllava.batch.result_key import keys_of
from atb_pllava.batch.result_log import ResultLog
from atb_pllava.batch.run_metadata import settings_of, write_manifest
from atb_pllava.batch.settings import check_recorded_settings, settings_digest
from atb_pllava.engine.outputs import RequestOutput
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.errors import ConfigError, VideoError
from atb_pllava.files import write_json
from atb_pllava.llm import LLM
from atb_pllava.prompt.tokenizer import Tokenizer
from precision.command_line import (
    Parser,
    add_engine_options,
    add_model_options,
    add_overwrite_option,
    add_prompt_options,
    add_sampling_options,
    from_cli_args,
    join_torchrun,
    load_model,
    planned_settings,
    run_command,
    sampling_params,
)
from precision.videobench.dataset import Question, find_sets, questions_file, read_json, read_questions
from precision.videobench.prompts import FORMATS, LETTER_ONLY, question_text

REMEDY = "name another --chat_conversation_output_folder, or start over with --overwrite"


def answer_sets(arguments: argparse.Namespace) -> int:
    """Ask the questions of every named set. Returns the exit status: 2 when some questions failed."""
    workers = join_torchrun(arguments)
    if isinstance(workers, int):
        return workers
    names = arguments.dataset_name or find_sets(arguments.Eval_QA_root)
    sets = {name: read_questions(arguments.Eval_QA_root, name) for name in names}
    folder = arguments.chat_conversation_output_folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made: {error.strerror}") from None
    if arguments.answer_request is not None and arguments.prompt_format != "videobench":
        raise ConfigError(f"--answer_request is part of --prompt_format videobench, not of {arguments.prompt_format}")
    if arguments.conversation is None:
        arguments.conversation = usual_conversation(arguments)
    params = replace(sampling_params(arguments), stop=FORMATS[arguments.prompt_format].stop)
    failed = 0
    with ExitStack() as stack:
        logs = {name: stack.enter_context(ResultLog(_log_path(folder, name), REMEDY)) for name in sets}
        if not arguments.overwrite:
            planned = planned_settings(arguments, params, workers)
            for name, log in logs.items():
                check_replaceable(_target(folder, name), log, {**planned, **_choices(arguments, name)}, only=True)
        llm = stack.enter_context(load_model(arguments, workers))
        for name, questions in sets.items():
            failed += answer_set(llm, name, questions, params, logs[name], arguments)
    return 2 if failed else 0


def usual_conversation(arguments: argparse.Namespace) -> str | None:
    """The prompt format's conversation, or its ChatML conversation if the checkpoint's tokenizer has ChatML tokens."""
    chosen = FORMATS[arguments.prompt_format]
    index = from_cli_args(arguments).model.config().image_token_index
    is_chatml = Tokenizer.from_dir(arguments.model_path, index).is_chatml
    return chosen.chatml_conversation if is_chatml else chosen.conversation


def answer_set(
    llm: LLM,
    name: str,
    questions: list[Question],
    params: SamplingParams,
    log: ResultLog,
    arguments: argparse.Namespace,
) -> int:
    """Ask the questions of one set and write its three files. Returns how many questions failed."""
    target = _target(arguments.chat_conversation_output_folder, name)
    prefix = FORMATS[arguments.prompt_format].answer_prefix
    asked = {question.name: question for question in questions}
    texts = {q.name: question_text(q, arguments.prompt_format, arguments.answer_request) for q in questions}
    settings = {**settings_of(llm, params), **_choices(arguments, name)}
    if not arguments.overwrite:
        check_replaceable(target, log, settings)
    log.begin(settings, overwrite=arguments.overwrite)

    def request_of(key: str) -> dict[str, Any]:
        video = arguments.Eval_Video_root / asked[key].vid_path
        if not video.is_file():
            text = f"there is no video {video}: --Eval_Video_root is the folder that holds Eval_video"
            raise VideoError(text, "not_found")
        return {"question": texts[key], "answer_prefix": prefix, "video": str(video)}

    files = [(question.name, arguments.Eval_Video_root / question.vid_path) for question in questions]
    keys = keys_of(files, len(files), arguments.quiet)
    answer_all(llm, keys, request_of, params, log, _kept, name, arguments.quiet)
    rows = {key.id: log.row(key) or {} for key in keys}
    write_manifest(
        target,
        llm,
        params,
        set=name,
        questions=len(rows),
        settings=settings_digest(settings),
        **_choices(arguments, name),
    )
    write_json(target, {key: _result(asked[key], texts[key], row) for key, row in rows.items()})
    failed = sum("error" in row for row in rows.values())
    print(f"{name}: {len(rows) - failed} answered, {failed} failed: {target}", flush=True)
    return failed


def check_replaceable(target: Path, log: ResultLog, settings: Mapping[str, Any], only: bool = False) -> None:
    """Raise ConfigError when `target` or its log has results of other settings.

    With `only`, `settings` is a part of the settings, and only these names are compared.
    """
    log.check(settings, only)
    manifest = target.with_name(f"{target.name}.manifest.json")
    if log.is_new and target.exists():
        before = read_json(manifest) if manifest.exists() else {}
        if "weights" not in before:
            raise ConfigError(f"{target} exists, and no manifest says what its answers were made with; {REMEDY}")
        check_recorded_settings(target, before, settings, REMEDY)


def _choices(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """The choices that decide a set's answers besides the model and its settings."""
    return {
        "prompt_format": arguments.prompt_format,
        "answer_request": arguments.answer_request,
        "questions_sha256": hashlib.sha256(questions_file(arguments.Eval_QA_root, name).read_bytes()).hexdigest(),
    }


def _target(folder: Path, name: str) -> Path:
    return folder / f"{name}_eval.json"


def _log_path(folder: Path, name: str) -> Path:
    return folder / f"{name}_eval.log.jsonl"


def _kept(_: str, answer: RequestOutput) -> Row:
    return {"text": answer.text, "token_ids": answer.token_ids, "time": answer.metrics.latency}


def _result(question: Question, text: str, row: Row) -> dict[str, Any]:
    """The result row of a question, in the form of Video-Bench's tools."""
    answered = {"video_id": question.item.get("video_id"), "question": text}
    if "error" in row:
        return {**answered, "output_sequence": [""], "dataset": question.dataset, "error": row["error"]}
    return {**answered, "output_sequence": [row["text"]], "time": row["time"], "dataset": question.dataset}


def parser() -> argparse.ArgumentParser:
    """The command's options: those of MindIE's scripts, and the model options of `python -m atb_pllava run`."""
    parser = Parser(
        prog="python precision/videobench/answer_questions.py", description="Answer the questions of Video-Bench."
    )
    group = parser.add_argument_group("Video-Bench")
    group.add_argument("--Eval_QA_root", type=Path, required=True, help="folder that holds Eval_QA with the questions")
    group.add_argument("--Eval_Video_root", type=Path, required=True, help="folder that holds Eval_video")
    group.add_argument(
        "--dataset_name", action="append", metavar="SET", help="sampling_data or a set; repeatable (default: every set)"
    )
    group.add_argument(
        "--chat_conversation_output_folder",
        type=Path,
        default=Path("Chat_results"),
        metavar="DIR",
        help="where <set>_eval.json goes (default Chat_results)",
    )
    group.add_argument(
        "--prompt_format",
        choices=tuple(FORMATS),
        default="mvbench",
        help="mvbench (default): as PLLaVA's own evaluation; videobench: as Video-Bench's tools",
    )
    group.add_argument(
        "--answer_request",
        metavar="TEXT",
        help=f"last words of a question in the videobench format (default {LETTER_ONLY!r})",
    )
    add_overwrite_option(group, "the output folder")
    group.add_argument("--quiet", action="store_true", help="only results, warnings and errors")
    add_model_options(parser)
    add_prompt_options(parser)
    add_engine_options(parser)
    add_sampling_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_command(parser().parse_args, answer_sets))

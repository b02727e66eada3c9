"""`python -m atb_pllava predict`: one answer about every medium, in one JSON file, for a judge to compare.

The file is the `predict_result.json` of MindIE's precision tests: {media path: text}, sorted by path. Two files lie
beside it. The manifest says with which settings the answers were made. The log (`batch.result_log`) gets each answer as
soon as it is finished. The log stays: a later run asks about new and changed files only.

Answers about other media stay in the file when the manifest shows the same settings. With other settings, or without a
manifest, the command ends with an error, unless --overwrite is given.
"""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from atb_pllava.batch.answering import answer_all
from atb_pllava.batch.log_line import Row
from atb_pllava.batch.progress import failures
from atb_pllava.batch.result_key import keys_of
from atb_pllava.batch.result_log import ResultLog
from atb_pllava.batch.run_metadata import settings_of, write_manifest
from atb_pllava.batch.settings import check_recorded_settings, settings_digest
from atb_pllava.cli.engine_args import (
    add_engine_options,
    add_model_options,
    add_prompt_options,
    add_sampling_options,
    sampling_params,
)
from atb_pllava.cli.loading import join_torchrun, load_model
from atb_pllava.cli.media_option import add_media, check_paths
from atb_pllava.cli.question import question
from atb_pllava.cli.resuming import add_overwrite_option, planned_settings
from atb_pllava.cli.waiting import waited_for_media
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.errors import ConfigError, counted
from atb_pllava.files import check_writable, read_json, write_json
from atb_pllava.llm import LLM
from atb_pllava.multimodal.media import list_media
from atb_pllava.prompt.chat_template import DEFAULT_PROMPT

DEFAULT_OUTPUT = "predict_result.json"
REMEDY = "name another --output_json, or start over with --overwrite"


class Medium(NamedTuple):
    """A file to ask about: its path relative to the input folder, with `/`, and its path as the user would type it."""

    id: str
    path: str


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `predict`."""
    add_model_options(parser)
    group = parser.add_argument_group("input")
    add_media(group)
    group.add_argument(
        "--prompt", type=question, default=DEFAULT_PROMPT, metavar="TEXT", help=f"question (default {DEFAULT_PROMPT!r})"
    )
    add_prompt_options(parser)
    add_engine_options(parser)
    add_sampling_options(parser)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output_json",
        default=DEFAULT_OUTPUT,
        metavar="FILE",
        help="{media path: text}; answers in it about other media stay, those of other settings are refused; "
        f"FILE.answers.jsonl keeps every answer as soon as it is there (default {DEFAULT_OUTPUT})",
    )
    add_overwrite_option(group, "FILE")
    group.add_argument("--quiet", action="store_true", help="only warnings and errors on stderr")


def predict(arguments: argparse.Namespace) -> int:
    """Write an answer about every medium to --output_json."""
    workers = join_torchrun(arguments)
    if isinstance(workers, int):
        return workers
    target = arguments.output_json
    overwrite = arguments.overwrite
    for path in (target, f"{target}.answers.jsonl", f"{target}.manifest.json"):
        check_writable(path, "--output_json", arguments.media)
    check_paths(arguments)
    params = sampling_params(arguments)
    media = given_media(arguments.media)
    with ResultLog(f"{target}.answers.jsonl", REMEDY) as log:
        results = Results(target)
        if not overwrite and not (log.is_new and results.is_new):
            planned = {**planned_settings(arguments, params, workers), "prompt": arguments.prompt}
            log.check(planned, only=True)
            results.check(planned, log)
        with load_model(arguments, workers, media_worker_at_load=True) as llm:
            began = time.perf_counter()
            stats_before = llm.engine.stats()
            rows = predict_media(llm, media, arguments.prompt, params, results, log, overwrite, arguments.quiet)
            waited = waited_for_media(stats_before, llm.engine.stats(), time.perf_counter() - began)
    failed = {medium.path: row for medium, row in zip(media, rows, strict=True) if "error" in row}
    for path, row in failed.items():
        error = row["error"]
        print(f"error: {error if path in error else f'{path}: {error}'}", file=sys.stderr)
    if not arguments.quiet:
        kinds = Counter(str(row["kind"]) for row in failed.values())
        summary = f"{counted(len(rows) - len(failed), 'answer')}, {failures(len(failed), kinds)}"
        print(f"wrote {target}: {summary}{waited}", file=sys.stderr)
    return 2 if failed else 0


def given_media(names: Sequence[str]) -> list[Medium]:
    """The media that the command line names, each once. An id is the path relative to the named folder.

    For a file that is named itself, the folder is the one that holds it. Raises VideoError as `list_media` does, and
    ConfigError for two media with the same id.
    """
    places: dict[str, Medium] = {}
    for name in names:
        root = name if os.path.isdir(name) else os.path.dirname(name)
        paths = list_media(name)
        for path, place in zip(paths, _places(paths), strict=True):
            medium = Medium(os.path.relpath(path, root or os.curdir).replace(os.sep, "/"), path)
            places.setdefault(place, medium)
    media = list(places.values())
    by_id: dict[str, Medium] = {}
    for medium in media:
        other = by_id.setdefault(medium.id, medium)
        if other is not medium:
            common = os.path.commonpath([os.path.abspath(other.path), os.path.abspath(medium.path)])
            raise ConfigError(
                f"{other.path} and {medium.path} would both be {medium.id!r} in the log, as each is named relative to "
                f"its own --media; name the folder that holds both: --media {common}"
            )
    return media


class Results:
    """predict_result.json and its manifest, as earlier runs left them.

    Raises ConfigError for a file that holds anything but {media path: text}.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.answers = existing_answers(path)
        self.digest = settings_digest(self.answers) if self.answers else None
        self._manifest_path = f"{path}.manifest.json"

    @property
    def is_new(self) -> bool:
        """Whether the file has no answers."""
        return self.digest is None

    def check(self, settings: Mapping[str, Any], log: ResultLog) -> None:
        """Raise ConfigError unless the manifest has these settings. Settings that it lacks are not compared.

        No error is raised about answers that `log` may replace, since an earlier run began with --overwrite.
        """
        if self.is_new or self.is_replaced_by(log):
            return
        manifest = self._manifest()
        if manifest is None:
            raise ConfigError(
                f"{self.path} exists, and no manifest beside it says what its answers were made with, as MindIE writes "
                f"none; {REMEDY}"
            )
        check_recorded_settings(self.path, manifest, settings, REMEDY)
        known = [manifest[name] for name in ("results_digest", "replaced_digest") if name in manifest]
        if known and self.digest not in known:
            raise ConfigError(
                f"{self.path} is not what its manifest is about: something else has changed or replaced it; {REMEDY}"
            )

    def others(self, media: Iterable[Medium], log: ResultLog) -> dict[str, str]:
        """Answers about other files than `media`, by path. Empty when `log` may replace all answers.

        A path that was relative to another working directory becomes absolute.
        """
        if self.is_new or self.is_replaced_by(log):
            return {}
        here = os.getcwd()
        base = (self._manifest() or {}).get("directory", here)
        paths = list(self.answers) if base == here else [str(Path(base, name)) for name in self.answers]
        ours = set(_places([medium.path for medium in media]))
        kept = zip(paths, _places(paths), self.answers.values(), strict=True)
        return {path: text for path, place, text in kept if place not in ours}

    def is_replaced_by(self, log: ResultLog) -> bool:
        """Whether `log` belongs to a run with --overwrite that has not replaced these answers yet."""
        return log.replaces is not None and log.replaces == self.digest

    def _manifest(self) -> dict[str, Any] | None:
        if not os.path.exists(self._manifest_path):
            return None
        manifest = read_json(self._manifest_path)
        if not isinstance(manifest, dict) or "weights" not in manifest or "prompt" not in manifest:
            raise ConfigError(f"{self._manifest_path} is no manifest of this command; {REMEDY}")
        return manifest


def predict_media(
    llm: LLM,
    media: Sequence[Medium],
    prompt: str,
    params: SamplingParams,
    results: Results,
    log: ResultLog,
    overwrite: bool = False,
    quiet: bool = False,
) -> list[Row]:
    """Ask `prompt` about each medium that `log` has no answer to, and write the results and their manifest.

    Returns a row for each of `media`, in their order. A medium that fails has a row with an "error" and no entry in
    the results. After an interruption the finished answers are in the results too, unless the results still hold the
    answers that --overwrite replaces. Raises ConfigError for a log or results of other settings, and for a file that
    cannot be written.
    """
    settings = {**settings_of(llm, params), "prompt": prompt}
    if overwrite:
        log.begin(settings, overwrite=True, replaces=results.digest)
    else:
        log.check(settings)
        results.check(settings, log)
        log.begin(settings)
    others = results.others(media, log)
    is_replacing = results.is_replaced_by(log)
    paths = {medium.id: medium.path for medium in media}
    keys = keys_of(media, len(media), quiet)
    if len(others) < len(results.answers) and log.is_new and not (is_replacing or quiet):
        print(f"{results.path} has answers but no log: its answers about these media are asked again", file=sys.stderr)

    def request_of(name: str) -> dict[str, str]:
        return {"question": prompt, "video": paths[name]}

    def write() -> list[Row]:
        rows = [_short(log.row(key)) for key in keys]
        texts = {paths[key.id]: row["text"] for key, row in zip(keys, rows, strict=True) if "text" in row}
        before = None if is_replacing else results.digest
        if any(rows):
            _write(results.path, llm, params, prompt, {**others, **texts}, rows, before)
        return rows

    try:
        answer_all(llm, keys, request_of, params, log, what="predictions", quiet=quiet)
    except BaseException:
        if not is_replacing:
            with suppress(ConfigError):  # the run ends with that same error already
                write()
        elif not quiet:
            print(
                f"{results.path} still holds the old answers; the new ones are in {log.path}, and the same command "
                "without --overwrite goes on",
                file=sys.stderr,
            )
        raise
    rows = write()
    log.keep_results()
    return rows


def existing_answers(path: str) -> dict[str, str]:
    """{media path: text} of an earlier run. Empty without a file. Raises ConfigError for any other content."""
    if not Path(path).exists():
        return {}
    answers = read_json(path)
    if not isinstance(answers, dict) or not all(isinstance(text, str) for text in answers.values()):
        raise ConfigError(f"{path} exists and is not {{media path: text}}; move it away or name another --output_json")
    return answers


def _short(row: Row | None) -> Row:
    """The text or the error of a row of the log. Empty without a row. Token ids are left out to save memory."""
    return {name: (row or {})[name] for name in ("text", "error", "kind") if name in (row or {})}


def _write(
    path: str,
    llm: LLM,
    params: SamplingParams,
    prompt: str,
    answers: Mapping[str, str],
    rows: Sequence[Row],
    before: str | None,
) -> None:
    """Write the manifest, then the results.

    The manifest names the digests of the new results and of the results `before`. After a kill between the two writes,
    the manifest then fits the results that are there. The log's header names results that --overwrite replaces.
    """
    write_manifest(
        path,
        llm,
        params,
        prompt=prompt,
        answers=sum("text" in row for row in rows),
        failed=sum("error" in row for row in rows),
        results_digest=settings_digest(answers),
        replaced_digest=before,
    )
    write_json(path, dict(sorted(answers.items())))


def _places(paths: Sequence[str]) -> list[str]:
    """The real paths of files, whether their folder is named relative, absolute, through `..` or through a link."""
    folders: dict[str, str] = {}
    places = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder or os.curdir)
        places.append(os.path.join(folders[folder], name))
    return places

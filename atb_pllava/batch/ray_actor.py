"""CaptionActor: the worker of a caption run on Ray. It loads the model once and captions blocks of items."""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from atb_pllava.batch.caption_item import CaptionItem
from atb_pllava.batch.caption_prompts import Prompt
from atb_pllava.batch.captioner import LocalCaptioner
from atb_pllava.batch.captioning import CaptionRun
from atb_pllava.batch.log_line import Row
from atb_pllava.batch.progress import Progress
from atb_pllava.batch.result_log import ResultLog
from atb_pllava.batch.run_metadata import model_settings
from atb_pllava.engine.arguments import EngineArgs
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.errors import PllavaError
from atb_pllava.llm import LLM
from atb_pllava.multimodal.limits import MediaLimits


@dataclass(frozen=True)
class ActorModel:
    """What every actor loads and asks.

    folder: the working directory, to which relative paths refer on every machine. allowed_media_domains: the hosts
    that videos may be fetched from; None means none.
    """

    args: EngineArgs
    params: SamplingParams
    prompts: Sequence[Prompt]
    folder: str
    allowed_media_domains: str | None
    limits: MediaLimits


def encode_task(item: CaptionItem, names: Sequence[str]) -> str:
    """An item and the names of the prompts that are asked about it, as JSON."""
    return json.dumps({"item": {**asdict(item), "columns": dict(item.columns)}, "prompts": list(names)})


class CaptionActor:
    """A callable class of Ray's `map_batches`. One actor runs one call at a time."""

    def __init__(self, model: ActorModel) -> None:
        """Load the model. An error is kept, and is the result of every call."""
        self._prompts = {prompt.name: prompt for prompt in model.prompts}
        self._failure: str | None = None
        try:
            self._captioner, self._settings = _load(model)
        except PllavaError as error:
            self._failure = str(error)
        except OSError as error:
            self._failure = f"{model.folder} is the working directory, and all machines must have it: {error.strerror}"

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """A batch {"task": texts of `encode_task`} to one JSON object in the column "result".

        The object has the model's "settings" and the "rows" of a result log. Or it has "failure", the reason why this
        actor cannot answer anything.
        """
        result: dict[str, Any] = {"failure": self._failure}
        if self._failure is None:
            try:
                result = {"settings": self._settings, "rows": self._rows([json.loads(task) for task in batch["task"]])}
            except PllavaError as error:  # of an engine that is dead, or of a full disk; the rows have all others
                result = {"failure": str(error)}
        return {"result": [json.dumps(result)]}

    def _rows(self, tasks: Sequence[Mapping[str, Any]]) -> list[Row]:
        """The rows about these items, by the same run as without Ray, into a log that lasts for this call."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "rows.jsonl")
            with ResultLog(path) as log:
                log.begin({})
                for names, group in groupby(tasks, lambda task: task["prompts"]):
                    items = [CaptionItem(**task["item"]) for task in group]
                    prompts = [self._prompts[name] for name in names if name in self._prompts]
                    CaptionRun(self._captioner, items, prompts, log, Progress("captions", None, quiet=True)).run()
            with open(path, encoding="utf-8") as lines:
                return [row for row in map(json.loads, lines) if "log" not in row]


def _load(model: ActorModel) -> tuple[LocalCaptioner, Mapping[str, Any]]:
    os.chdir(model.folder)
    urls = None
    if model.allowed_media_domains is not None:
        from atb_pllava.batch.url_media import UrlMedia  # its packages are an extra

        urls = UrlMedia(model.allowed_media_domains, model.limits)
    llm = LLM(model.args)
    return LocalCaptioner(llm, model.params, urls), model_settings(llm)

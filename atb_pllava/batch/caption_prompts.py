"""The prompts of a caption run, and the presets: the published captioning set-ups, with prompts in our own words.

The system texts and turns of a preset are a conversation of `prompt/chat_template.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from atb_pllava.errors import ConfigError
from atb_pllava.prompt.chat_template import DEFAULT_PROMPT

# The intent of the request in PLLaVA's tasks/eval/recaption: one careful paragraph without doubtful details.
RECAPTION_REQUEST = (
    "Help me to describe the input video. Answer with one paragraph that is precise and rich.\n"
    "# Instructions\n"
    "1. Leave out fine details such as colours and numbers of things, which are easily mistaken.\n"
    "2. Go through the video carefully instead, and work out what matters in the whole of it.\n"
    "3. What you are not sure of does not belong in the answer.\n"
    "# Task\n"
    "Describe the background, the characters and the actions in the video.\n"
)


@dataclass(frozen=True)
class Prompt:
    """A question about every video. `name` stands in the rows."""

    name: str
    text: str


@dataclass(frozen=True)
class Preset:
    """A published captioning set-up.

    `conversation` and `conversation_chatml` (34B) None mean the choice of PromptOptions. The lengths and the resize
    mode are those of the published scripts.
    """

    help: str
    prompt: str = DEFAULT_PROMPT
    conversation: str | None = None
    conversation_chatml: str | None = None
    video_caption: bool = False
    max_output_length: int = 200
    resize: str = "clip"

    def options(self, is_chatml: bool) -> dict[str, Any]:
        """The values of the command line's options of the same names."""
        return {
            "conversation": self.conversation_chatml if is_chatml else self.conversation,
            "video_caption": self.video_caption,
            "max_output_length": self.max_output_length,
            "resize": self.resize,
        }


PRESETS = {
    "recaption": Preset(
        "PLLaVA's recaptioning",
        RECAPTION_REQUEST,
        conversation="eval_recaption",
        conversation_chatml="eval_recaption_llavanext",
        max_output_length=400,
    ),
    "opensora": Preset(
        "Open-Sora's captions of its training set",
        conversation="demo",
        video_caption=True,
        max_output_length=256,
        resize="res672",
    ),
    "npu": Preset("PLLaVA-NPU's --video_caption", video_caption=True),
    "vcg": Preset(
        "PLLaVA's VCGBench script: long answers",
        conversation="eval_vcgbench",
        conversation_chatml="eval_vcg_llavanext",
        max_output_length=512,
    ),
}


def chosen_prompts(texts: Sequence[str], preset: str | None) -> list[Prompt]:
    """The prompts of a run: the given texts, or the preset's prompt, or the default one.

    A preset's prompt has the preset's name. Other prompts are numbered from 1. Raises ConfigError for a text that is
    given twice.
    """
    if not texts:
        return [Prompt("1", DEFAULT_PROMPT)] if preset is None else [Prompt(preset, PRESETS[preset].prompt)]
    twice = [text for number, text in enumerate(texts) if text in texts[:number]]
    if twice:
        raise ConfigError(f"--prompt {twice[0]!r} is given twice; give it once")
    return [Prompt(str(number), text) for number, text in enumerate(texts, start=1)]

"""OpenAI chat inside MindIE: a list of messages to the token ids of a prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

from atb_llm.models.base.input_builder import InputBuilder

from atb_pllava.errors import RequestError
from atb_pllava.mindie.prompt_builder import PromptBuilder
from atb_pllava.mindie.truncation import Truncation
from atb_pllava.prompt.messages import parse_chat_messages

# Keys of chat_template_kwargs. enable_thinking is accepted when it is off: PLLaVA has no thinking mode.
_KNOWN = ("truncation", "max_length", "enable_thinking")
_LEFT = 1  # MindIE's TruncationSide; -1 and True are the right side, 0 and False are no truncation


class PllavaInputBuilder(InputBuilder):  # type: ignore[misc]
    """MindIE's InputBuilder with the conversation templates of this package instead of a chat_template."""

    def __init__(self, tokenizer: Any, prompts: PromptBuilder, **kwargs: Any) -> None:
        super().__init__(tokenizer, **kwargs)
        self.prompts = prompts

    def make_context(
        self,
        rank: int,
        conversation: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        adapt_to_max_length: bool = False,
        **kwargs: Any,
    ) -> list[int]:
        """Token ids of the prompt. The frames of its videos and images are in shared memory afterwards.

        conversation: messages as in `parse_chat_messages`. User messages in a row are joined. add_generation_prompt:
        must be True. chat_template_kwargs: `truncation` shortens the text of a prompt longer than `max_length` tokens
        (default: the length in MindIE's config.json), at the left side for 1, at the right side for -1 and True.
        adapt_to_max_length: shorten at the left side when chat_template_kwargs has no `truncation`. Videos stay whole.
        `rank` is not used. Raises RequestError, VideoError or BackendError.
        """
        options = kwargs.get("chat_template_kwargs") or {}
        unknown = sorted(name for name, value in options.items() if name not in _KNOWN and value is not None)
        if unknown:
            raise RequestError(f"chat_template_kwargs has {', '.join(unknown)}; PLLaVA knows {', '.join(_KNOWN)}")
        if options.get("enable_thinking"):
            raise RequestError("enable_thinking is on; PLLaVA has no thinking mode")
        if not add_generation_prompt:
            raise RequestError("add_generation_prompt is off; PLLaVA only answers, it does not continue messages")
        truncation = self._truncation(options, adapt_to_max_length)
        return self.prompts.build(parse_chat_messages(conversation), kwargs.get("shm_name_save_path"), truncation)

    def _truncation(self, options: Mapping[str, Any], adapt: bool) -> Truncation | None:
        side = options.get("truncation", adapt and _LEFT)
        if not side:
            return None
        return Truncation(options.get("max_length") or self.max_length, from_left=side is not True and side == _LEFT)

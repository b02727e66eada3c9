"""OpenAI chat: a list of messages to the ids of a prompt, as the host's InputBuilder does for text."""

from collections.abc import Mapping, Sequence
from typing import Any

from atb_llm.models.base.input_builder import InputBuilder

from atb_pllava.errors import RequestError
from atb_pllava.mindie.dialogue import from_messages
from atb_pllava.mindie.prompt_builder import PromptBuilder, Truncation

# Of chat_template_kwargs. enable_thinking is about models that think aloud; this one has nothing to switch off.
_KNOWN = ("truncation", "max_length", "enable_thinking")
_LEFT = 1  # the host's TruncationSide; -1 and True are the right side, 0 and False are no truncation


class PllavaInputBuilder(InputBuilder):  # type: ignore[misc]
    """Uses the conversation templates of this package and no chat_template."""

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
        """Ids of the prompt; the frames of its videos and images are in shared memory then.

        A conversation has a system text if it wants, user and assistant messages in turn, and media in any of the
        user's. `chat_template_kwargs` says whether a prompt that is too long is shortened (quirk 13), and to what.
        Raises RequestError or VideoError.
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
        return self.prompts.build(from_messages(conversation), kwargs.get("shm_name_save_path"), truncation)

    def _truncation(self, options: Mapping[str, Any], adapt: bool) -> Truncation | None:
        side = options.get("truncation", adapt and _LEFT)
        if not side:
            return None
        return Truncation(options.get("max_length") or self.max_length, from_left=side is not True and side == _LEFT)

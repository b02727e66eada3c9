"""PromptOptions: the user's choice of conversation template and system text."""

from dataclasses import dataclass, field

from atb_pllava.config import check_choice, option
from atb_pllava.errors import ConfigError
from atb_pllava.prompt.chat_template import CONVERSATIONS, Conversation, choose_conversation


@dataclass(frozen=True)
class PromptOptions:
    """How questions become prompts. `conversation` None means the template that fits the checkpoint's vocabulary.

    `system` replaces the template's system text. `video_caption` is the captioning mode of the NPU port.

    Raises ConfigError for an unknown conversation, and for video_caption beside both other options.
    """

    conversation: str | None = field(
        default=None,
        metadata=option("prompt format, see below", metavar="NAME", choices=tuple(CONVERSATIONS)),
    )
    system: str | None = field(
        default=None, metadata=option("system text instead of the conversation's own", metavar="TEXT")
    )
    video_caption: bool = field(default=False, metadata=option("PLLaVA-NPU's captioning turns and system text"))

    def __post_init__(self) -> None:
        if self.conversation is not None:
            check_choice("conversation", self.conversation, tuple(CONVERSATIONS))
            if self.video_caption and self.system is not None:
                raise ConfigError("video_caption has no effect beside conversation and system; leave one of them out")

    def choose(self, is_chatml: bool) -> Conversation:
        """The conversation template. `is_chatml`: the checkpoint's vocabulary has ChatML's turn markers, as in 34B."""
        return choose_conversation(
            self.conversation, chatml=is_chatml, system=self.system, video_caption=self.video_caption
        )

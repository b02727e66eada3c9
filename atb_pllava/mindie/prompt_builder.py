"""What MindIE's tokenizer process does for us: a request to the ids of its prompt, its frames into shared memory.

No device is touched here; that process has none.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from atb_pllava.config import PllavaConfig
from atb_pllava.errors import ConfigError, RequestError
from atb_pllava.loader.checkpoint_config import read_preprocessor_config
from atb_pllava.mindie.dialogue import Dialogue, shorten
from atb_pllava.mindie.media_ids import check_block_length, insert_blocks
from atb_pllava.mindie.segments import Segment, remove_segments, write_segment
from atb_pllava.multimodal.processor import VideoProcessor
from atb_pllava.prompt.chat_template import Conversation, choose_conversation, render_turns
from atb_pllava.prompt.tokenizer import Tokenizer

NAMES_FILE = "shm_name.txt"  # beside the folders of a request's media


@dataclass(frozen=True)
class PluginOptions:
    """`"models": {"pllava": {...}}` in MindIE's config.json: which of the published pipelines to follow."""

    conversation: str | None = None
    system: str | None = None
    sampler: str = "demo"
    resize: str = "clip"

    @classmethod
    def from_host(cls, llm_config: Any) -> "PluginOptions":
        """From the host's LLMConfig, if there is one. Raises ConfigError for a name that is none of these."""
        section = llm_config.get("models.pllava") if llm_config else None
        given: Mapping[str, Any] = section.to_dict() if section else {}
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ConfigError(f"models.pllava has {', '.join(unknown)}; it may have {', '.join(known)}")
        return cls(**{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class Truncation:
    """The host's longest prompt, and where to shorten one that is longer."""

    limit: int
    from_left: bool


@dataclass(frozen=True)
class PromptBuilder:
    """The checkpoint's tokenizer and pipeline, put to work for one request after the other."""

    config: PllavaConfig
    tokenizer: Tokenizer
    conversation: Conversation
    reader: VideoProcessor

    def __post_init__(self) -> None:
        check_block_length(self.config.num_video_tokens)

    @classmethod
    def from_dir(
        cls, model_dir: str | os.PathLike[str], config: PllavaConfig, options: PluginOptions | None = None
    ) -> "PromptBuilder":
        options = options or PluginOptions()
        tokenizer = Tokenizer.from_dir(model_dir, config.image_token_index)
        conversation = choose_conversation(options.conversation, chatml=tokenizer.is_chatml, system=options.system)
        if tokenizer.token_id(conversation.assistant_end.strip()) is None:
            raise ConfigError(
                f"conversation {options.conversation!r} ends turns with {conversation.assistant_end.strip()}, which is "
                f"no token of {os.fspath(model_dir)}: the _llavanext conversations are for 34B"
            )
        preprocessor = read_preprocessor_config(model_dir, config.vision.image_size)
        reader = VideoProcessor(config.num_frames, preprocessor, options.sampler, options.resize)
        return cls(config, tokenizer, conversation, reader)

    @property
    def stop_token_ids(self) -> list[int]:
        """The checkpoint's own, and the one that ends the template's turns."""
        end = self.tokenizer.token_id(self.conversation.assistant_end.strip())
        assert end is not None
        return list(dict.fromkeys([*self.config.eos_token_ids, end]))

    def build(
        self, dialogue: Dialogue, names_file: str | os.PathLike[str] | None = None, truncation: Truncation | None = None
    ) -> list[int]:
        """Ids of the prompt with a block for each video or image, whose frames now lie in shared memory.

        `names_file` is where their names go, by default the host's for the request the media belong to.
        Raises RequestError, VideoError or BackendError; then nothing of this request is in shared memory.
        """
        if truncation and self._too_long(dialogue, truncation.limit):
            limit = truncation.limit
            dialogue = shorten(dialogue, lambda cut: self._too_long(cut, limit), from_left=truncation.from_left)
        ids = self.token_ids(dialogue)
        if not dialogue.media:
            return ids
        if names_file is None:
            names_file = os.path.join(os.path.dirname(os.path.dirname(dialogue.media[0])), NAMES_FILE)
        videos = self.reader.prepare(dialogue.media)
        segments: list[Segment] = []
        try:
            for video in videos:
                segments.append(write_segment(video, names_file))
        except BaseException:
            remove_segments(segments)
            raise
        return insert_blocks(ids, segments, self.config.image_token_index, self.config.num_video_tokens)

    def token_ids(self, dialogue: Dialogue) -> list[int]:
        """Ids of the prompt, with one image token for each video or image."""
        ids = self.tokenizer.encode_pieces(render_turns(self.conversation, dialogue.turns, system=dialogue.system))
        found = sum(token == self.config.image_token_index for token in ids)
        if found != len(dialogue.media):
            raise RequestError(f"the text makes {found - len(dialogue.media)} more image tokens than there are media")
        return ids

    def _too_long(self, dialogue: Dialogue, limit: int) -> bool:
        media_tokens = len(dialogue.media) * (self.config.num_video_tokens - 1)
        return len(self.token_ids(dialogue)) + media_tokens > limit

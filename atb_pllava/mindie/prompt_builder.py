"""Turns a chat into token ids and puts the frames of its media into shared memory, in MindIE's tokenizer process.

MindIE's tokenizer process has no NPU, so nothing in this file uses a device.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from atb_pllava.config import PllavaConfig
from atb_pllava.errors import ConfigError, RequestError
from atb_pllava.loader.checkpoint_config import read_preprocessor_config
from atb_pllava.mindie.media_ids import check_block_length, insert_blocks
from atb_pllava.mindie.segments import Segment, remove_segments, write_segment
from atb_pllava.mindie.truncation import Truncation, shorten
from atb_pllava.multimodal.image_sequence import ImageSequence
from atb_pllava.multimodal.processor import VideoProcessor
from atb_pllava.prompt.chat_template import Conversation, choose_conversation, render_turns
from atb_pllava.prompt.messages import Chat
from atb_pllava.prompt.tokenizer import Tokenizer

# In the folder of a request, beside the folders of its media. MindIE frees the segments that this file names.
NAMES_FILE = "shm_name.txt"


@dataclass(frozen=True)
class PluginOptions:
    """The section `"models": {"pllava": {...}}` of MindIE's config.json.

    conversation and system: the prompt template and its system text. sampler: the rule of frame sampling. resize: how
    frames become squares. None is the checkpoint's own.
    """

    conversation: str | None = None
    system: str | None = None
    sampler: str = "demo"
    resize: str = "clip"

    @classmethod
    def from_host(cls, llm_config: Any) -> "PluginOptions":
        """The options in the host's LLMConfig. None gives the defaults. Raises ConfigError for an unknown name."""
        section = llm_config.get("models.pllava") if llm_config else None
        given: Mapping[str, Any] = section.to_dict() if section else {}
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ConfigError(f"models.pllava has {', '.join(unknown)}; it may have {', '.join(known)}")
        return cls(**{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class PromptBuilder:
    """Tokenizer, template and video processor of one checkpoint. Requests are built one after the other."""

    config: PllavaConfig
    tokenizer: Tokenizer
    conversation: Conversation
    processor: VideoProcessor

    def __post_init__(self) -> None:
        check_block_length(self.config.num_video_tokens)

    @classmethod
    def from_dir(
        cls, model_dir: str | os.PathLike[str], config: PllavaConfig, options: PluginOptions | None = None
    ) -> "PromptBuilder":
        """Read the files of a checkpoint. Raises ConfigError for a template whose end marker is no token."""
        options = options or PluginOptions()
        tokenizer = Tokenizer.from_dir(model_dir, config.image_token_index)
        conversation = choose_conversation(options.conversation, chatml=tokenizer.is_chatml, system=options.system)
        if tokenizer.token_id(conversation.turn_end) is None:
            raise ConfigError(
                f"conversation {options.conversation!r} ends turns with {conversation.turn_end}, which is "
                f"no token of {os.fspath(model_dir)}: the _llavanext conversations are for 34B"
            )
        preprocessor = read_preprocessor_config(model_dir, config.vision.image_size)
        processor = VideoProcessor(config.num_frames, preprocessor, options.sampler, options.resize)
        return cls(config, tokenizer, conversation, processor)

    @property
    def stop_token_ids(self) -> list[int]:
        """The end tokens of the checkpoint, and the token that ends an answer in the template."""
        end = self.tokenizer.token_id(self.conversation.turn_end)
        assert end is not None
        return list(dict.fromkeys([*self.config.eos_token_ids, end]))

    def build(
        self, chat: Chat, names_file: str | os.PathLike[str] | None = None, truncation: Truncation | None = None
    ) -> list[int]:
        """Token ids of the prompt with a block of ids for each medium. The frames are in shared memory afterwards.

        The segments' names are appended to `names_file`. The default file lies two folders above the first
        medium, where the host looks for the file. `truncation` shortens text. None keeps the length of a prompt.
        Raises RequestError, VideoError or BackendError. No segment of the request remains then.
        """
        if truncation and self._is_too_long(chat, truncation.max_tokens):
            most = truncation.max_tokens
            chat = shorten(chat, lambda cut: self._is_too_long(cut, most), from_left=truncation.from_left)
        ids = self.token_ids(chat)
        if not chat.media:
            return ids
        if names_file is None:
            names_file = os.path.join(os.path.dirname(os.path.dirname(_first_path(chat))), NAMES_FILE)
        media = [item.medium for item in chat.media]
        videos = self.processor.prepare(media, None, [item.time_range for item in chat.media])
        segments: list[Segment] = []
        try:
            for video in videos:
                segments.append(write_segment(video, names_file))
        except BaseException:
            remove_segments(segments)
            raise
        return insert_blocks(ids, segments, self.config.image_token_index, self.config.num_video_tokens)

    def token_ids(self, chat: Chat) -> list[int]:
        """Token ids of the prompt with one image token for each medium."""
        ids = self.tokenizer.encode_pieces(render_turns(self.conversation, chat.turns, system=chat.system))
        found = sum(token == self.config.image_token_index for token in ids)
        if found != len(chat.media):
            raise RequestError(f"the text makes {found - len(chat.media)} more image tokens than there are media")
        return ids

    def _is_too_long(self, chat: Chat, max_tokens: int) -> bool:
        media_tokens = len(chat.media) * (self.config.num_video_tokens - 1)
        return len(self.token_ids(chat)) + media_tokens > max_tokens


def _first_path(chat: Chat) -> str:
    """The path of the first medium. The host has stored all media as files."""
    medium = chat.media[0].medium
    return os.fsdecode(medium.images[0] if isinstance(medium, ImageSequence) else medium)

"""PLLaVA for the host's workers: our video encoder in front of the host's LLaMA, its graph, cache and split weights."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from atb_llm.models.llama.flash_causal_llama import FlashLlamaForCausalLM
from atb_llm.models.pllava.config_pllava import PllavaConfig
from torch import Tensor

from atb_pllava.errors import BackendError, RequestError
from atb_pllava.loader.weight_loader import open_checkpoint
from atb_pllava.mindie.dialogue import DEFAULT_QUESTION
from atb_pllava.mindie.host_checks import (
    check_features,
    check_groups,
    check_head_size,
    check_layout,
    check_world_size,
)
from atb_pllava.mindie.media_ids import find_blocks
from atb_pllava.mindie.prompt_builder import PluginOptions, PromptBuilder
from atb_pllava.mindie.segments import read_segment
from atb_pllava.mindie.video_encoder import VideoEncoder
from atb_pllava.multimodal.processor import ProcessedVideo
from atb_pllava.prompt.chat_template import Turn, render_turns
from atb_pllava.prompt.placeholders import VideoSpan, expand_placeholders
from atb_pllava.prompt.tokenizer import IMAGE_TOKEN

VIDEO_PLACEHOLDER = "<video>"  # in the host's example scripts


class FlashPllavaForCausalLM(FlashLlamaForCausalLM):  # type: ignore[misc]
    """The host's FlashLlamaForCausalLM, whose prompts may contain videos."""

    def __init__(self, config: PllavaConfig, weights: Any, **kwargs: Any) -> None:
        """`weights` is the host's open Weights, `kwargs` what its ModelRunner passes on. Refuses before it loads."""
        try:
            check_world_size(weights.process_group.size(), config.pllava.text)
            check_head_size(config.pllava.text)
            check_features(kwargs, weights.mapping)
            checkpoint = open_checkpoint(config.model_name_or_path)
            check_layout(checkpoint)
            check_groups(weights.process_group.size(), config.pllava.text, checkpoint.int8.group_size)
            encoder = VideoEncoder(config.pllava, checkpoint, weights.device, weights.dtype)
            prefixes = ("language_model.lm_head", "language_model.model")
            super().__init__(config.text_config, weights, *prefixes, **{**kwargs, "inference_mode": None})  # quirk 17
        except TypeError as error:  # quirk 6
            raise BackendError(f"PLLaVA and this version of MindIE do not fit together: {error}") from error
        self.is_multimodal = True
        self.encoder, self.pllava = encoder, config.pllava
        options = PluginOptions.from_host(kwargs.get("llm_config"))
        self.prompts = PromptBuilder.from_dir(config.model_name_or_path, config.pllava, options)

    def prepare_prefill_token(self, multimodalinputs: Any, processor: Any) -> Tensor:
        """The PA runner's request to embeddings [n, hidden]. `processor` is the host's and not needed.

        `text` is taken literally when it has `<image>` (or the `<video>` of the host's own scripts), once for each
        medium, and else put into the template; `video` and `image` are paths or lists of them; `frames`, where there
        is one, is the number of frames of each.
        """
        media = [*_as_list(multimodalinputs.video), *_as_list(multimodalinputs.image)]
        ids, spans = self._runner_prompt(multimodalinputs.text or DEFAULT_QUESTION, len(media))
        frames = getattr(multimodalinputs, "frames", None) or self.pllava.num_frames
        videos = replace(self.prompts.reader, num_frames=frames).prepare(media) if media else []
        return self._embed(torch.tensor(ids, device=self.device), spans, videos)

    def prepare_prefill_token_service(self, input_ids: Tensor) -> Tensor:
        """Ids [n] of a batch of prompts, videos as blocks among them, to embeddings [n, hidden]."""
        blocks = find_blocks(input_ids.tolist(), self.pllava.image_token_index, self.pllava.num_video_tokens)
        preprocessor = self.prompts.reader.preprocessor
        videos = [read_segment(segment, preprocessor) for _, segment in blocks]
        return self._embed(input_ids, [span for span, _ in blocks], videos)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        is_prefill: bool,
        kv_cache: Sequence[tuple[Tensor, Tensor]],
        block_tables: Tensor,
        slots: Tensor,
        input_lengths: Tensor,
        max_seq_len: int,
        lm_head_indices: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As the host's; in prefill `input_ids` are ids [n] or embeddings [n, hidden]. Logits [batch, vocabulary]."""
        if max_seq_len > self.max_position_embeddings:  # quirk 8
            raise RequestError(
                f"a sequence of {max_seq_len} tokens; the rotary table has {self.max_position_embeddings} positions: "
                "lower maxSeqLen, or raise max_position_embeddings in config.json"
            )
        if not self.ascend_weight:
            self._start()
        if is_prefill:
            # The graph writes into what it is given (quirk 5).
            input_ids = self.prepare_prefill_token_service(input_ids) if input_ids.dim() == 1 else input_ids.clone()
        self.skip_word_embedding = bool(is_prefill)  # quirk 3
        logits: Tensor = super().forward(
            input_ids, position_ids, is_prefill, kv_cache, block_tables, slots, input_lengths, max_seq_len,
            lm_head_indices, **kwargs)  # fmt: skip
        return logits[:, : self.pllava.text.vocab_size]  # quirk 15

    def _start(self) -> None:
        """Once all weights are on the device: have the memory of a video (quirk 14), and build the graphs (quirk 3)."""
        self.encoder.warm_up()
        self.skip_word_embedding = True
        self.init_ascend_weight()

    def _runner_prompt(self, text: str, media: int) -> tuple[list[int], list[VideoSpan]]:
        tokenizer, conversation = self.prompts.tokenizer, self.prompts.conversation
        if IMAGE_TOKEN not in text:
            text = text.replace(VIDEO_PLACEHOLDER, IMAGE_TOKEN)
        if IMAGE_TOKEN in text:
            ids = tokenizer.encode(text)
        else:
            ids = tokenizer.encode_pieces(render_turns(conversation, [Turn(text, media)]))
        return expand_placeholders(ids, self.pllava.image_token_index, media, self.pllava.num_video_tokens)

    @torch.no_grad()  # the host's words would have a gradient
    def _embed(self, ids: Tensor, spans: Sequence[VideoSpan], videos: Sequence[ProcessedVideo]) -> Tensor:
        """A new tensor [n, hidden]: words from the host's table, videos from our encoder, one after the other."""
        embeddings: Tensor = self.model.embed_tokens(ids.clamp(min=0))  # negative ids name segments
        for span, video in zip(spans, videos, strict=True):
            embeddings[span.start : span.start + span.length] = self.encoder(video)
        return embeddings


def _as_list(media: Any) -> list[Any]:
    if media is None:
        return []
    return list(media) if isinstance(media, list | tuple) else [media]

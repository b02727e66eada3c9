"""PLLaVA in MindIE's workers: the video encoder of this package in front of MindIE's LLaMA.

MindIE's LLaMA brings the compiled graph, the paged KV cache and tensor parallelism. "Quirk N" in a comment is number N
in `mindie.quirks`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from atb_llm.models.llama.flash_causal_llama import FlashLlamaForCausalLM
from atb_llm.models.pllava.config_pllava import PllavaConfig
from torch import Tensor

from atb_pllava.errors import BackendError, RequestError
from atb_pllava.loader.weight_loader import open_checkpoint
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
from atb_pllava.prompt.messages import DEFAULT_QUESTION
from atb_pllava.prompt.placeholders import VideoSpan, expand_placeholders
from atb_pllava.prompt.tokenizer import IMAGE_TOKEN

VIDEO_PLACEHOLDER = "<video>"  # in the host's example scripts


class FlashPllavaForCausalLM(FlashLlamaForCausalLM):  # type: ignore[misc]
    """MindIE's FlashLlamaForCausalLM with prompts that contain videos."""

    def __init__(self, config: PllavaConfig, weights: Any, **kwargs: Any) -> None:
        """weights: MindIE's open Weights. kwargs: the keyword arguments of MindIE's ModelRunner.

        Raises ConfigError or WeightError, before anything is loaded, for what MindIE would compute wrongly. Raises
        BackendError instead of TypeError, which MindIE would answer by a second call with fewer arguments.
        """
        try:
            check_world_size(weights.process_group.size(), config.pllava.text)
            check_head_size(config.pllava.text)
            check_features(kwargs, weights.mapping)
            checkpoint = open_checkpoint(config.model_name_or_path)
            check_layout(checkpoint)
            check_groups(weights.process_group.size(), config.pllava.text, checkpoint.int8.group_size)
            encoder = VideoEncoder(config.pllava, checkpoint, weights.device, weights.dtype)
            prefixes = ("language_model.lm_head", "language_model.model")
            # FlashLlama fails in its first forward with MindIE's default inference mode (quirk 17).
            super().__init__(config.text_config, weights, *prefixes, **{**kwargs, "inference_mode": None})
        except TypeError as error:  # MindIE would hide it behind a second call (quirk 6)
            raise BackendError(f"PLLaVA and this version of MindIE do not fit together: {error}") from error
        self.is_multimodal = True
        self.encoder = encoder
        self.pllava = config.pllava
        options = PluginOptions.from_host(kwargs.get("llm_config"))
        self.prompts = PromptBuilder.from_dir(config.model_name_or_path, config.pllava, options)

    def prepare_prefill_token(self, multimodalinputs: Any, processor: Any) -> Tensor:
        """A request of MindIE's PA runner to embeddings [n, hidden]. `processor` is not used.

        `multimodalinputs` has video and image (a path or a list of paths), text, and perhaps frames, the number of
        frames of each video. A text with `<image>`, or with the `<video>` of MindIE's scripts, is the whole prompt,
        with one such mark for each medium. Any other text is a question, which goes into the template.
        Raises RequestError or VideoError.
        """
        media = [*_as_list(multimodalinputs.video), *_as_list(multimodalinputs.image)]
        ids, spans = self._runner_prompt(multimodalinputs.text or DEFAULT_QUESTION, len(media))
        frames = getattr(multimodalinputs, "frames", None) or self.pllava.num_frames
        videos = replace(self.prompts.processor, num_frames=frames).prepare(media) if media else []
        return self._embed(torch.tensor(ids, device=self.device), spans, videos)

    def prepare_prefill_token_service(self, input_ids: Tensor) -> Tensor:
        """Token ids [n] of all prompts of a batch, with a block of ids for each video, to embeddings [n, hidden].

        Raises RequestError for a block that is not whole, and for frames that are no longer in shared memory.
        """
        blocks = find_blocks(input_ids.tolist(), self.pllava.image_token_index, self.pllava.num_video_tokens)
        preprocessor = self.prompts.processor.preprocessor
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
        """Logits [batch, vocabulary] of a prefill or a decode step, with the arguments of FlashForCausalLM.forward.

        In prefill `input_ids` are token ids [n] from the service, or embeddings [n, hidden] from the PA runner.
        Raises RequestError for a sequence longer than the rotary table.
        """
        if max_seq_len > self.max_position_embeddings:  # MindIE does not check it (quirk 8)
            raise RequestError(
                f"a sequence of {max_seq_len} tokens; the rotary table has {self.max_position_embeddings} positions: "
                "lower maxSeqLen, or raise max_position_embeddings in config.json"
            )
        if not self.ascend_weight:
            self._start()
        if is_prefill:
            # The graph overwrites its input embeddings (quirk 5), so it gets a tensor that nobody else holds.
            input_ids = self.prepare_prefill_token_service(input_ids) if input_ids.dim() == 1 else input_ids.clone()
        # Prefill gets embeddings and decode gets token ids, and MindIE has one flag for both (quirk 3).
        self.skip_word_embedding = bool(is_prefill)
        logits: Tensor = super().forward(
            input_ids,
            position_ids,
            is_prefill,
            kv_cache,
            block_tables,
            slots,
            input_lengths,
            max_seq_len,
            lm_head_indices,
            **kwargs,
        )
        return logits[:, : self.pllava.text.vocab_size]  # the columns behind the vocabulary are 0 (quirk 15)

    def _start(self) -> None:
        """Encode one video and build the graphs, in the first forward, when all weights are on the device.

        MindIE measures free memory after a warm-up with text only (quirk 14). Encoding a video here makes that
        measurement include the vision tower's memory. The graphs must be built with skip_word_embedding (quirk 3).
        """
        self.encoder.warm_up()
        self.skip_word_embedding = True
        self.init_ascend_weight()

    def _runner_prompt(self, text: str, media: int) -> tuple[list[int], list[VideoSpan]]:
        tokenizer = self.prompts.tokenizer
        conversation = self.prompts.conversation
        if IMAGE_TOKEN not in text:
            text = text.replace(VIDEO_PLACEHOLDER, IMAGE_TOKEN)
        if IMAGE_TOKEN in text:
            ids = tokenizer.encode(text)
        else:
            ids = tokenizer.encode_pieces(render_turns(conversation, [Turn(text, media)]))
        return expand_placeholders(ids, self.pllava.image_token_index, media, self.pllava.num_video_tokens)

    @torch.no_grad()  # MindIE's embedding table has requires_grad
    def _embed(self, ids: Tensor, spans: Sequence[VideoSpan], videos: Sequence[ProcessedVideo]) -> Tensor:
        """A new tensor [n, hidden]: the embeddings of `ids` from MindIE's table, with each video's rows in its span.

        Videos are encoded one after the other.
        """
        embeddings: Tensor = self.model.embed_tokens(ids.clamp(min=0))  # negative ids name segments
        for span, video in zip(spans, videos, strict=True):
            embeddings[span.start : span.start + span.length] = self.encoder(video)
        return embeddings


def _as_list(media: Any) -> list[Any]:
    if media is None:
        return []
    return list(media) if isinstance(media, list | tuple) else [media]

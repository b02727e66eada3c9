"""The paged decoder: a prefill graph and a decode graph over one KV cache. Every input is checked."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atb_llm.models.llama.config_llama import LlamaConfig
from atb_pllava.loader.checkpoint_config import read_config
from atb_pllava.loader.weight_loader import open_checkpoint, unused_vision_layers
from atb_pllava.model.pllava import Pllava
from atb_pllava.ops.forward_batch import ForwardBatch, SequenceBatch
from atb_pllava.ops.reference import TorchBackend

STALE = 7.0  # in unused cache, because memory of a card is not zero
PADDED = 3  # columns of logits behind the vocabulary, as ranks have them that divide it unevenly


class WordTable(nn.Module):
    """An embedding table in which ids outside the vocabulary are rows of zeros."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.pad(weight, (0, 0, 0, 1)))  # with a gradient, as the host's

    def forward(self, ids: Tensor) -> Tensor:
        last = len(self.weight) - 1
        return F.embedding(torch.where((ids < 0) | (ids >= last), last, ids), self.weight)


class FlashLlamaForCausalLM(nn.Module):
    def __init__(
        self,
        config: LlamaConfig,
        weights: Any,
        lmhead_prefix: str = "lm_head",
        model_prefix: str = "model",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        assert isinstance(config, LlamaConfig) and config.pe_type == "ROPE" and config.torch_dtype == weights.dtype
        assert (lmhead_prefix, model_prefix) == ("language_model.lm_head", "language_model.model")
        self.config = config
        self.inference_mode = kwargs.get("inference_mode")
        self.dtype = weights.dtype
        self.device = weights.device
        self.quantize = config.quantize
        self.adapter_manager = None
        self.soc_info = "soc"
        self.head_size = config.hidden_size // config.num_attention_heads
        self.num_attention_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.num_layers = config.num_hidden_layers
        self.max_position_embeddings = config.max_position_embeddings
        self.is_multimodal = self.skip_word_embedding = False
        self.decoder = weights.read_decoder()
        self.model = nn.Module()
        self.model.embed_tokens = WordTable(self.decoder.embedding)
        self.ascend_weight: list[Any] = []
        self.placeholder = torch.zeros(1, dtype=self.dtype)
        self.kv_cache: Any = None
        self.calls: list[tuple[bool, int]] = []

    def init_ascend_weight(self) -> None:
        self.prefill_skips_words = self.skip_word_embedding  # the decode graph never does
        self.ascend_weight = [self.decoder]

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        is_prefill: bool,
        kv_cache: Any,
        block_tables: Tensor,
        slots: Tensor,
        input_lengths: Tensor,
        max_seq_len: int,
        lm_head_indices: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if not self.ascend_weight:
            self.init_ascend_weight()
        if self.inference_mode is not None:
            _ = self.inference_mode.enable_prefill_pa  # one of the host's two classes lacks it
        self._check_cache(kv_cache)
        ids = self.placeholder
        embeddings = self.placeholder
        if self.skip_word_embedding:
            embeddings = input_ids
        else:
            ids = input_ids
        if is_prefill and self.prefill_skips_words:
            assert embeddings.shape == (len(position_ids), self.config.hidden_size), tuple(embeddings.shape)
            assert embeddings.dtype == self.dtype and embeddings.is_contiguous() and not embeddings.requires_grad
            x = embeddings
        else:
            assert ids.dim() == 1 and ids.dtype == torch.int64, f"Gather of {ids.dtype} {tuple(ids.shape)}"
            assert int(ids.min()) >= 0 and int(ids.max()) < self.config.vocab_size
            x = self.decoder.embed(ids)
        logits = self._execute(x.clone(), position_ids, is_prefill, block_tables, slots, input_lengths, lm_head_indices)
        if x is embeddings:
            embeddings.fill_(float("nan"))  # the graph leaves its own results there
        self.calls.append((is_prefill, len(position_ids)))
        return F.pad(logits, (0, PADDED), value=1e4).to(self.dtype)

    def _check_cache(self, kv_cache: Any) -> None:
        assert len(kv_cache) == self.num_layers
        if self.kv_cache is not None:
            assert self.kv_cache is kv_cache
            return
        self.kv_cache = kv_cache
        blocks, block_size, heads, dim = kv_cache[0][0].shape
        assert (heads, dim) == (self.num_key_value_heads, self.head_size)
        self.paged = TorchBackend().new_kv_cache(self.num_layers, blocks, block_size, heads, dim, self.dtype)
        for part in (part for layer in self.paged for part in layer):
            part.fill_(STALE)

    def _execute(
        self,
        x: Tensor,
        positions: Tensor,
        is_prefill: bool,
        tables: Tensor,
        slots: Tensor,
        lengths: Tensor,
        logits_rows: Tensor | None,
    ) -> Tensor:
        assert int(positions.max()) < self.max_position_embeddings, "a position outside of the rotary table"
        assert slots.shape == positions.shape == (len(x),) and len(tables) == len(lengths)
        sizes = lengths.tolist()
        if is_prefill:
            assert sum(sizes) == len(x) and logits_rows is not None
            rows = logits_rows
        else:
            assert len(sizes) == len(x) and logits_rows is None
            rows = torch.arange(len(x))
        work = SequenceBatch.of(sizes if is_prefill else [1] * len(sizes), sizes, tables.long())
        none = SequenceBatch.of([], [], tables[:0].long())
        prefill, decode = (work, none) if is_prefill else (none, work)
        batch = ForwardBatch(positions, positions, slots.long(), decode, prefill, rows.long())
        with torch.no_grad():
            return self.decoder(x, batch, self.paged)


class Group:
    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0


class Mapping:
    pipeline = False

    def has_pp(self) -> bool:
        return self.pipeline


class Weights:
    """The files of a directory. The host's class reads the language model from them."""

    def __init__(self, path: str, device: torch.device, dtype: torch.dtype, size: int = 1) -> None:
        self.path = path
        self.device = device
        self.dtype = dtype
        self.process_group = Group(size)
        self.mapping = Mapping()

    def read_decoder(self) -> Any:
        config = read_config(self.path)
        checkpoint = open_checkpoint(self.path)
        model = Pllava(config, TorchBackend(), self.dtype, int8=checkpoint.int8)
        parts = model.weight_map()
        shapes = {name: part.shape for name, part in parts.items()}
        plan = checkpoint.check(shapes, unused=unused_vision_layers(config))
        assert all(item.weight.key == name for name, item in plan.items.items()), "the host knows plain names only"
        for _ in plan.load(parts):
            pass
        return model.language

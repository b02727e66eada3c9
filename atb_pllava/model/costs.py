"""The cost of each part of a request, from the model's sizes: FLOPs, bytes read from memory, bytes sent between ranks.

A multiply-add is 2 FLOPs, in matrix products and in attention. Every weight is read once a step, and every cached key
and value once a token. Norms, rotary embeddings, activations and the rows of the embedding are not counted. Together
they are below 1 % of a decode step's bytes and of a prefill's FLOPs.

Weights are counted in the form of the checkpoint. An int8 weight has a scale and a zero point in the model's dtype, for
each row or for each row and group. The form after `Backend.pack` is not counted. The CPU kernels, for example, read
scales in float32, and read no zero points of symmetric weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from atb_pllava.config import PllavaConfig
from atb_pllava.distributed.tensor_parallel import TensorParallel
from atb_pllava.ops.int8 import QuantConfig, column_groups
from atb_pllava.ops.reference import TorchBackend


@dataclass(frozen=True)
class Cost:
    """The work of one rank.

    bytes: read from memory. sent: bytes sent to other ranks. messages: the number of collectives.
    """

    flops: float = 0.0
    bytes: float = 0.0
    sent: float = 0.0
    messages: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.flops + other.flops, self.bytes + other.bytes, self.sent + other.sent, self.messages + other.messages
        )


@dataclass(frozen=True)
class Costs:
    """The costs of a model on one of its ranks.

    element: bytes of a float of the model, 2 for bfloat16. int8: the W8A16 layers of the decoder.
    int8_kv: whether keys and values are int8. reduced: bytes of an element in an all-reduce. A CPU sums in float32 and
    has 4.
    """

    config: PllavaConfig
    element: int = 2
    int8: QuantConfig = QuantConfig()
    parallel: TensorParallel = TensorParallel()
    reduced: int = 2
    int8_kv: bool = False

    def vision(self, frames: int) -> Cost:
        """The layers of the CLIP tower that PLLaVA computes, and the projector, on this rank's share of `frames`."""
        vision = self.config.vision
        text = self.config.text
        width = vision.hidden_size
        patches = vision.grid**2
        tokens = patches + 1
        layers = self.config.vision_layers_used
        per_layer = 2 * tokens * (4 * width**2 + 2 * width * vision.intermediate_size) + 4 * tokens**2 * width
        embedding = 2 * patches * 3 * vision.patch_size**2 * width
        projector = 2 * patches * (width * text.hidden_size + text.hidden_size**2)
        mine = len(self.parallel.share(frames))
        gathered = self._gather(frames * patches * text.hidden_size * self.element)
        return Cost(mine * (embedding + layers * per_layer + projector), self.vision_weight_bytes) + gathered

    def prefill(self, lengths: Sequence[int]) -> Cost:
        """One step over whole prompts of these lengths, with causal attention and logits for the last token of each."""
        tokens = sum(lengths)
        attended = sum(length * (length + 1) / 2 for length in lengths)
        return self._decoder(tokens, attended, len(lengths), read=0)

    def decode(self, contexts: Sequence[int]) -> Cost:
        """One step that adds a token to each sequence. `contexts` are the context lengths, the new token included."""
        return self._decoder(len(contexts), sum(contexts), len(contexts), read=sum(contexts))

    def _decoder(self, tokens: int, attended: float, wanted: int, read: int) -> Cost:
        """A step over `tokens` new tokens, of which `wanted` tokens get logits.

        Each head computes `attended` query-key pairs. `read` cached tokens are read from memory.
        """
        text = self.config.text
        layers = text.num_hidden_layers
        linear = 2 * tokens * layers * sum(rows * len(columns) for rows, columns in self._linears().values())
        attention = 4 * attended * layers * self._heads * text.head_dim
        head = 2 * wanted * self._vocab_rows * text.hidden_size
        cache = (read + tokens) * self.kv_bytes_per_token
        return Cost(linear + attention + head, self.decoder_weight_bytes + cache) + self._between_ranks(tokens, wanted)

    def _between_ranks(self, tokens: int, wanted: int) -> Cost:
        """An all-reduce after the embedding, two in each layer, and the gather of the float32 logits."""
        text = self.config.text
        size = self.parallel.size
        if size == 1:
            return Cost()
        reductions = 2 * text.num_hidden_layers + 1
        # A ring all-reduce sends (size - 1) / size of the bytes to sum, and as many to distribute the sums.
        ring = 2 * (size - 1) / size * tokens * text.hidden_size * self.reduced
        return Cost(sent=reductions * ring, messages=reductions) + self._gather(wanted * text.vocab_size * 4)

    def _gather(self, total: int) -> Cost:
        """An all-gather: every rank has its share of `total` bytes and receives the shares of the others."""
        size = self.parallel.size
        return Cost() if size == 1 else Cost(sent=(size - 1) / size * total, messages=1)

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers: 512 KiB for 7B in bfloat16 on one rank."""
        text = self.config.text
        return TorchBackend.kv_bytes_per_token(
            text.num_hidden_layers, self._kv_heads, text.head_dim, self.element, self.int8_kv
        )

    @property
    def decoder_weight_bytes(self) -> int:
        """Bytes of the weights that a decode step reads: layers, last norm and lm_head, without the embedding."""
        text = self.config.text
        layers = text.num_hidden_layers
        linears = self._linears()
        total = sum(
            self._linear_bytes(rows, columns, f"language_model.model.layers.{layer}.{name}.weight" in self.int8.names)
            for layer in range(layers)
            for name, (rows, columns) in linears.items()
        )
        return total + ((2 * layers + 1) * text.hidden_size + self._vocab_rows * text.hidden_size) * self.element

    @property
    def vision_weight_bytes(self) -> int:
        """Bytes of the vision tower and the projector, which are whole on every rank."""
        vision = self.config.vision
        text = self.config.text
        width = vision.hidden_size
        inner = vision.intermediate_size
        layer = 4 * (width**2 + width) + 2 * width * inner + inner + width + 4 * width
        embedding = width * (1 + 3 * vision.patch_size**2 + vision.grid**2 + 1 + 2)
        projector = (width + text.hidden_size + 2) * text.hidden_size
        return (self.config.vision_layers_used * layer + embedding + projector) * self.element

    @property
    def weight_bytes(self) -> int:
        """All weights of this rank, the embedding included."""
        embedding = self._vocab_rows * self.config.text.hidden_size * self.element
        return self.vision_weight_bytes + self.decoder_weight_bytes + embedding

    def _linear_bytes(self, rows: int, columns: range, int8: bool) -> int:
        """Bytes of one linear weight. Every rank with some columns of a group has the group's scale and zero point."""
        if not int8:
            return rows * len(columns) * self.element
        groups = column_groups(slice(columns.start, columns.stop), self.int8.group_size)
        return rows * (len(columns) + 2 * len(range(groups.start, groups.stop)) * self.element)

    def _linears(self) -> dict[str, tuple[int, range]]:
        """A layer's matrices on this rank: how many rows, and which columns of the whole matrix."""
        text = self.config.text
        kv_heads = self.parallel.share(text.num_key_value_heads)
        width = range(text.hidden_size)
        inner = self.parallel.share(text.intermediate_size)
        per_kv_head = text.num_attention_heads // text.num_key_value_heads * text.head_dim
        heads = range(kv_heads.start * per_kv_head, kv_heads.stop * per_kv_head)  # elements of all heads side by side
        kv_rows = len(kv_heads) * text.head_dim
        return {
            "self_attn.q_proj": (len(heads), width),
            "self_attn.k_proj": (kv_rows, width),
            "self_attn.v_proj": (kv_rows, width),
            "self_attn.o_proj": (text.hidden_size, heads),
            "mlp.gate_proj": (len(inner), width),
            "mlp.up_proj": (len(inner), width),
            "mlp.down_proj": (text.hidden_size, inner),
        }

    @property
    def _kv_heads(self) -> int:
        return len(self.parallel.share(self.config.text.num_key_value_heads))

    @property
    def _heads(self) -> int:
        text = self.config.text
        return self._kv_heads * (text.num_attention_heads // text.num_key_value_heads)

    @property
    def _vocab_rows(self) -> int:
        return len(self.parallel.share(self.config.text.vocab_size))

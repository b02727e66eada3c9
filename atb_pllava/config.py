"""The configuration of a model and of an engine: frozen dataclasses that check their values.

`loader/checkpoint_config.py` makes the model's part from a checkpoint's JSON files. The user's options make
EngineConfig. Derived numbers are properties. No file is read here, and torch is not imported.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

from atb_pllava.errors import ConfigError, check_whole_number

LARGEST_WORLD = 8  # devices
DTYPE_CHOICES = ("auto", "float32", "bfloat16", "float16")
KV_CACHE_DTYPES = ("auto", "int8")

# Upper bounds of sizes in config.json: a damaged file must not ask for terabytes.
_LARGEST = {"num_hidden_layers": 1024, "vocab_size": 2**24}
_LARGEST_SIZE = 2**20


@dataclass(frozen=True)
class VisionConfig:
    """CLIP vision tower. The defaults are those of transformers' CLIPVisionConfig: config.json omits equal values."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        sizes = (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "image_size",
            "patch_size",
        )
        _check_sizes("vision_config", self, sizes)
        _check_positive("vision_config.layer_norm_eps", self.layer_norm_eps)
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"vision_config: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"vision_config: image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.hidden_act not in ("quick_gelu", "gelu"):
            raise ConfigError(f"vision_config: hidden_act {self.hidden_act!r} is not supported: quick_gelu or gelu")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def grid(self) -> int:
        """Patches along one side: 24 for 336 pixels and 14-pixel patches."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class TextConfig:
    """LLaMA decoder. The defaults are those of transformers' LlamaConfig. The published 7B config.json omits them.

    0 stands for an omitted value: `num_key_value_heads` becomes num_attention_heads, and `head_dim` becomes
    hidden_size / num_attention_heads.
    """

    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0
    head_dim: int = 0
    vocab_size: int = 32000
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        _check_sizes("text_config", self, ("hidden_size", "num_attention_heads"))
        if self.num_key_value_heads == 0:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim == 0:
            if self.hidden_size % self.num_attention_heads:
                raise ConfigError(
                    f"text_config: hidden_size {self.hidden_size} is not a multiple of "
                    f"num_attention_heads {self.num_attention_heads}"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        _check_sizes("text_config", self, ("intermediate_size", "num_hidden_layers", "num_key_value_heads", "head_dim"))
        _check_sizes("text_config", self, ("vocab_size", "max_position_embeddings"))
        _check_positive("text_config.rms_norm_eps", self.rms_norm_eps)
        _check_positive("text_config.rope_theta", self.rope_theta)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"text_config: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"text_config: head_dim {self.head_dim} is odd; rotary embeddings need pairs")


@dataclass(frozen=True)
class PllavaConfig:
    """The whole model. A video of `num_frames` frames becomes prod(pooling_shape) video embeddings.

    The defaults of `num_frames` and `pooling_shape` are PLLaVA's (tasks/eval/model_utils.py::load_pllava).
    """

    vision: VisionConfig
    text: TextConfig
    image_token_index: int = 32000
    num_frames: int = 16
    pooling_shape: tuple[int, int, int] = (16, 12, 12)
    vision_feature_layer: int = -2
    eos_token_ids: tuple[int, ...] = (2,)
    dtype: str = "float32"  # of the stored weights. On an accelerator, the option value "auto" means this dtype
    notice: str = ""  # one line from the checkpoint's author, shown to users

    def __post_init__(self) -> None:
        check_num_frames(self.num_frames)
        check_pooling_shape(self.pooling_shape)
        if not 1 <= self.vision_layers_used <= self.vision.num_hidden_layers:
            raise ConfigError(
                f"vision_feature_layer {self.vision_feature_layer} does not exist in a vision tower of "
                f"{self.vision.num_hidden_layers} layers"
            )
        self._check_token("image_token_index", self.image_token_index)
        for token in self.eos_token_ids:
            self._check_token("eos_token_id", token)

    def _check_token(self, name: str, token: object) -> None:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self.text.vocab_size:
            raise ConfigError(f"{name} is {token!r}; it must be an integer from 0 to {self.text.vocab_size - 1}")

    @property
    def vision_layers_used(self) -> int:
        """Layers of the vision tower that PLLaVA computes: 23 for hidden state -2 of 24 layers."""
        layers = self.vision.num_hidden_layers
        return self.vision_feature_layer if self.vision_feature_layer >= 0 else layers + 1 + self.vision_feature_layer

    @property
    def num_video_tokens(self) -> int:
        """Positions that one video takes in the prompt: 2304 for 16x12x12."""
        t, h, w = self.pooling_shape
        return t * h * w

    def with_video(
        self, num_frames: int | None = None, pooling_shape: Sequence[int] | str | None = None
    ) -> "PllavaConfig":
        """The same model with another number of frames or another pooling shape. None keeps the present value."""
        return replace(
            self,
            num_frames=self.num_frames if num_frames is None else num_frames,
            pooling_shape=self.pooling_shape if pooling_shape is None else check_pooling_shape(pooling_shape),
        )

    def with_layers(self, layers: int) -> "PllavaConfig":
        """The same model with another number of decoder layers."""
        return replace(self, text=replace(self.text, num_hidden_layers=layers))


@dataclass(frozen=True)
class PreprocessorConfig:
    """How frames become pixel values of the vision tower. The defaults are CLIP's at 336 pixels."""

    crop_size: int = 336
    shortest_edge: int = 336  # lower bound of PLLaVA's first resize, in pixels (processor_config.json)
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Option:
    """The command line option of a dataclass field. `cli/engine_args.py` makes the option from the field.

    {default} in `help` becomes the field's default. `metavar` stands for the value in --help.
    """

    help: str
    metavar: str = "N"
    choices: tuple[str, ...] | None = None


def option(help: str, metavar: str = "N", choices: Sequence[str] | None = None) -> dict[str, Option]:
    """The `metadata` of a dataclass field, which makes the field an option of the command line."""
    return {"option": Option(help, metavar, None if choices is None else tuple(choices))}


@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs. Every field is the user's choice. No field comes from the checkpoint.

    `block_size` is the number of tokens in a KV block. `max_batch_size` is the number of sequences at a time.
    A request for n answers or with n beams is n sequences.
    `max_input_length` and `max_output_length` count tokens of one request. None: the KV cache is the only bound.
    `kv_cache_bytes` bounds the KV cache. None: room for `max_batch_size` requests, but at most half the free memory.
    `prefill_chunk` is the largest number of prompt tokens in a step while other requests decode. `vision_batch` is the
    number of frames that each rank encodes at once, and bounds the vision tower's memory. None for either takes the
    backend's number: 512 tokens and 8 frames on a CPU, 4096 tokens and 16 frames on an accelerator.
    `video_cache_bytes` bounds the encoder cache, and separately the frame cache. The encoder cache holds embeddings of
    earlier videos (18 MiB each for 7B in bfloat16). The frame cache holds their frames.
    `kv_cache_dtype` "int8" keeps keys and values in 8 bits, on the cpu and cuda backends. "auto" is the model's dtype.
    `prefix_cache` lets prompts with the same beginning, videos included, share KV blocks.
    `decode_graphs` lets a backend with graph capture launch a decode step as one graph. Other backends ignore the
    field.
    """

    block_size: int = field(default=128, metadata=option("tokens in a KV block (default {default})"))
    max_batch_size: int = field(default=8, metadata=option("requests at a time (default {default})"))
    max_input_length: int | None = field(
        default=None,
        metadata=option("longest prompt in tokens, video included (default: what the KV cache holds)"),
    )
    max_output_length: int | None = field(default=None, metadata=option("most tokens of an answer (default 200)"))
    kv_cache_bytes: int | None = field(
        default=None,
        metadata=option("memory for the KV cache (default: a full batch's, at most half of what is free)"),
    )
    prefill_chunk: int | None = field(
        default=None,
        metadata=option("most prompt tokens of a step while others decode (default: 512 on a CPU, else 4096)"),
    )
    vision_batch: int | None = field(
        default=None,
        metadata=option("frames that a rank encodes at once, bounds memory (default: 8 on a CPU, else 16)"),
    )
    video_cache_bytes: int = field(
        default=2**30,
        metadata=option("memory for earlier videos: their embeddings, and as much for frames (default 1 GiB; 0: none)"),
    )
    prefix_cache: bool = field(
        default=True,
        metadata=option("share keys and values of prompts that begin alike, video included (default on)"),
    )
    kv_cache_dtype: str = field(
        default="auto",
        metadata=option(
            "int8: keys and values in half the memory, slightly other numbers, CPU or CUDA; auto (default): as --dtype",
            "NAME",
            KV_CACHE_DTYPES,
        ),
    )
    decode_graphs: bool = field(
        default=True, metadata=option("launch a decode step as one graph where the device can (default on)")
    )

    def __post_init__(self) -> None:
        for name, (lowest, largest) in _ENGINE_RANGES.items():
            value = getattr(self, name)
            if value is not None or EngineConfig.__dataclass_fields__[name].default is not None:
                object.__setattr__(self, name, check_whole_number(name, value, lowest, largest))
        check_choice("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        for name in ("prefix_cache", "decode_graphs"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be True or False")


# Lowest and largest value of each number in EngineConfig. A field whose default is None may be None.
_ENGINE_RANGES = {
    "block_size": (1, 4096),
    "max_batch_size": (1, 4096),
    "prefill_chunk": (1, 2**20),
    "vision_batch": (1, 4096),
    "video_cache_bytes": (0, 2**62),
    "max_input_length": (1, 2**62),
    "max_output_length": (1, 2**62),
    "kv_cache_bytes": (1, 2**62),
}


def check_choice(name: str, value: str, allowed: Sequence[str]) -> str:
    """`value`. Raises ConfigError that names all allowed values unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
    return value


def check_num_frames(num_frames: object) -> int:
    """`num_frames` as an int. Raises ConfigError unless `num_frames` is a whole number from 1 to 4096.

    Fewer frames may be taken from one file: see `MediaLimits.max_sampled_frames`.
    """
    return check_whole_number("num_frames", num_frames, 1, 4096)


def check_pooling_shape(shape: object) -> tuple[int, int, int]:
    """`(16, 12, 12)`, `[16, 12, 12]`, `"16-12-12"` or `"16x12x12"` as a tuple. Raises ConfigError for anything else."""
    parts: Any = shape.replace("x", "-").split("-") if isinstance(shape, str) else shape
    try:
        sizes = tuple(int(p) if isinstance(p, str) else p for p in parts)
    except (TypeError, ValueError):
        sizes = ()
    good = len(sizes) == 3 and all(isinstance(s, int) and not isinstance(s, bool) and 1 <= s <= 4096 for s in sizes)
    if not good:
        raise ConfigError(
            f"pooling_shape is {shape!r}; it must be three whole numbers of at least 1, frames-rows-columns, "
            "for example 16-12-12"
        )
    if sizes[0] * sizes[1] * sizes[2] > 2**20:
        raise ConfigError(f"pooling_shape {shape!r} makes more than {2**20} video tokens; choose smaller numbers")
    return (sizes[0], sizes[1], sizes[2])


def _check_sizes(section: str, config: VisionConfig | TextConfig, names: Sequence[str]) -> None:
    for name in names:
        check_whole_number(f"{section}.{name}", getattr(config, name), 1, _LARGEST.get(name, _LARGEST_SIZE))


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not isfinite(value) or not 0 < value < 1e12:
        raise ConfigError(f"{name} is {value!r}; it must be a number above 0")

"""What a checkpoint directory says about the model, and what the user says about the run.

Both are read once, checked once and frozen; derived numbers are properties. This file knows nothing of torch.
Keys of config.json that PLLaVA never reads (published files carry many) are ignored; keys it would need to honour
and cannot are refused.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

from atb_pllava.errors import ConfigError, check_whole_number
from atb_pllava.files import read_object
from atb_pllava.loader.directory import check_directory, check_has_config

MODEL_TYPES = ("llava", "pllava", "llava_next")
LARGEST_WORLD = 8  # devices
DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_CACHE_DTYPES = ("auto", "int8")

# PLLaVA's own defaults where config.json says nothing (tasks/eval/model_utils.py::load_pllava).
DEFAULT_NUM_FRAMES = 16
DEFAULT_POOLING_SHAPE = (16, 12, 12)

_MAX_JSON_BYTES = 10 * 2**20
_LARGEST = {"num_hidden_layers": 1024, "vocab_size": 2**24}
_LARGEST_SIZE = 2**20
_LONGEST_NOTICE = 500  # characters

# What preprocessor_config.json may say besides sizes, mean and deviation; 3 is Pillow's bicubic filter.
_PREPROCESSING = {
    "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True, "resample": 3,
    "rescale_factor": 1 / 255,
}  # fmt: skip


@dataclass(frozen=True)
class VisionConfig:
    """CLIP vision tower; the defaults are those of transformers' CLIPVisionConfig, which config.json omits."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _check_sizes("vision_config", self)
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
    """LLaMA decoder; the defaults are those of transformers' LlamaConfig, which the published 7B file relies on."""

    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0  # 0: as many as attention heads
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    vocab_size: int = 32000
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_attention_heads"):
            check_whole_number(f"text_config.{name}", getattr(self, name), 1, _LARGEST_SIZE)
        if self.num_key_value_heads == 0:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim == 0:
            if self.hidden_size % self.num_attention_heads:
                raise ConfigError(
                    f"text_config: hidden_size {self.hidden_size} is not a multiple of "
                    f"num_attention_heads {self.num_attention_heads}"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        _check_sizes("text_config", self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"text_config: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"text_config: head_dim {self.head_dim} is odd; rotary embeddings need pairs")


@dataclass(frozen=True)
class PllavaConfig:
    """The whole model. `num_frames` frames become prod(pooling_shape) video tokens each time."""

    vision: VisionConfig
    text: TextConfig
    image_token_index: int = 32000
    num_frames: int = DEFAULT_NUM_FRAMES
    pooling_shape: tuple[int, int, int] = DEFAULT_POOLING_SHAPE
    vision_feature_layer: int = -2
    eos_token_ids: tuple[int, ...] = (2,)
    dtype: str = "float32"  # as stored: what "auto" means on an accelerator
    notice: str = ""  # one line that whoever made the checkpoint wants its users to read

    def __post_init__(self) -> None:
        check_num_frames(self.num_frames)
        object.__setattr__(self, "pooling_shape", check_pooling_shape(self.pooling_shape))
        if not 1 <= self.vision_layers_used <= self.vision.num_hidden_layers:
            raise ConfigError(
                f"vision_feature_layer {self.vision_feature_layer} does not exist in a vision tower of "
                f"{self.vision.num_hidden_layers} layers"
            )
        for what, token in [("image_token_index", self.image_token_index)] + [
            ("eos_token_id", t) for t in self.eos_token_ids
        ]:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self.text.vocab_size:
                raise ConfigError(f"{what} is {token!r}; it must be an integer from 0 to {self.text.vocab_size - 1}")

    @property
    def vision_layers_used(self) -> int:
        """Layers whose output counts: hidden state -2 of 24 layers needs 23 of them."""
        layers = self.vision.num_hidden_layers
        return self.vision_feature_layer if self.vision_feature_layer >= 0 else layers + 1 + self.vision_feature_layer

    @property
    def num_video_tokens(self) -> int:
        """Tokens one video takes in the prompt: 2304 for 16x12x12."""
        t, h, w = self.pooling_shape
        return t * h * w

    def with_video(
        self, num_frames: int | None = None, pooling_shape: Sequence[int] | str | None = None
    ) -> "PllavaConfig":
        """The same model fed with another number of frames or pooled to another shape; None keeps the file's."""
        return replace(
            self,
            num_frames=self.num_frames if num_frames is None else num_frames,
            pooling_shape=self.pooling_shape if pooling_shape is None else check_pooling_shape(pooling_shape),
        )

    def with_layers(self, layers: int) -> "PllavaConfig":
        """The same model with another number of decoder layers."""
        return replace(self, text=replace(self.text, num_hidden_layers=layers))

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> "PllavaConfig":
        """Build from the contents of config.json and, when there is one, generation_config.json.

        Raises ConfigError for a model that is not PLLaVA or LLaVA, impossible sizes, and features of LLaMA
        that PLLaVA does not have (tied embeddings, biases, scaled RoPE).
        """
        if raw.get("model_type") not in MODEL_TYPES:
            raise ConfigError(
                f"config.json says model_type {raw.get('model_type')!r}; PLLaVA checkpoints say one of "
                f"{', '.join(MODEL_TYPES)}"
            )
        text_raw, vision_raw = _section(raw, "text_config"), _section(raw, "vision_config")
        _refuse_unsupported(raw, text_raw)
        text = TextConfig(**_known(TextConfig, text_raw, also=_rope_theta(raw, text_raw)))
        eos = _first(generation or {}, text_raw, key="eos_token_id", default=2)
        return cls(
            vision=VisionConfig(**_known(VisionConfig, vision_raw)),
            text=text,
            image_token_index=raw.get("image_token_index", raw.get("image_token_id", 32000)),
            num_frames=raw.get("num_frames", DEFAULT_NUM_FRAMES),
            pooling_shape=raw.get("pooling_shape", DEFAULT_POOLING_SHAPE),
            vision_feature_layer=raw.get("vision_feature_layer", -2),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else (eos,),
            dtype=_stored_dtype(raw, text_raw),
            notice=_notice(raw),
        )

    @classmethod
    def from_dir(cls, model_dir: str | os.PathLike[str], option: str = "--model_path") -> "PllavaConfig":
        """Read config.json and generation_config.json of a checkpoint directory, which `option` named."""
        directory = check_directory(model_dir, option)
        config, generation = check_has_config(directory, option), directory / "generation_config.json"
        return cls.from_json(read_json(config), read_json(generation) if os.path.lexists(generation) else None)


@dataclass(frozen=True)
class PreprocessorConfig:
    """Numbers of a checkpoint that turn frames into pixels; the defaults are CLIP's at 336 pixels."""

    crop_size: int = 336
    shortest_edge: int = 336  # lower bound of PLLaVA's first resize (processor_config.json)
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_dir(cls, model_dir: str | os.PathLike[str], image_size: int) -> "PreprocessorConfig":
        """Read the image settings and PLLaVA's shortest_edge of a checkpoint directory; see `_image_settings`.

        Raises ConfigError for settings that PLLaVA's pipeline does not have, for a crop that is not `image_size`, and
        for two places in the directory that disagree.
        """
        directory = Path(model_dir)
        found = {where: _normalised(raw, image_size) for where, raw in _image_settings(directory)}
        first = next(iter(found), "")
        for where, settings in found.items():
            for key, value in settings.items():
                if value != found[first][key]:
                    raise ConfigError(
                        f"{first} says {key} {found[first][key]!r} and {where} says {value!r}; "
                        "remove the one that does not belong to these weights"
                    )
        mean, std = _checked_settings(found[first], first, image_size) if found else (cls.image_mean, cls.image_std)
        return cls(image_size, _shortest_edge(directory, image_size), mean, std)


@dataclass(frozen=True)
class Option:
    """How a dataclass field is an option of the command line. `cli/engine_args.py` makes the option from it.

    `help` may name the field's default as {default}. `metavar` stands for the value in --help.
    """

    help: str
    metavar: str = "N"
    choices: tuple[str, ...] | None = None


def option(help: str, metavar: str = "N", choices: Sequence[str] | None = None) -> dict[str, Option]:
    """The metadata of a dataclass field that is an option."""
    return {"option": Option(help, metavar, None if choices is None else tuple(choices))}


@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs. Every field is the user's choice; nothing comes from the checkpoint.

    `max_input_length` and `max_output_length` count tokens of one request. None: the KV cache is the only bound.
    `kv_cache_bytes` bounds the KV cache. None: room for `max_batch_size` requests, but at most half the free memory.
    `prefill_chunk` is the most prompt tokens of a step while other requests decode. `vision_batch` is the number of
    frames that each rank encodes at once; it bounds the vision tower's memory. `video_cache_bytes` bounds two caches:
    embeddings of earlier videos (18 MiB each for 7B in bfloat16) and, in as much memory again, their frames.
    `kv_cache_dtype` "int8" keeps keys and values in 8 bits, on the cpu backend only; "auto" is the model's dtype.
    `prefix_cache` lets prompts with the same beginning, videos included, share keys and values. `decode_graphs` lets
    a backend that can capture a decode step launch it as one graph.
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
    prefill_chunk: int = field(
        default=512, metadata=option("most prompt tokens of a step while others decode (default {default})")
    )
    vision_batch: int = field(
        default=8, metadata=option("frames that a rank encodes at once, bounds memory (default {default})")
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
            "int8: keys and values in half the memory, slightly other numbers, CPU only; auto (default): as --dtype",
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
    """`value` when it is one of `allowed`; ConfigError names them all otherwise."""
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
    return value


def check_num_frames(num_frames: object) -> int:
    """A usable number of sampled frames: an integer from 1 to 4096 (reading a file allows fewer, see MediaLimits)."""
    return check_whole_number("num_frames", num_frames, 1, 4096)


def check_pooling_shape(shape: object) -> tuple[int, int, int]:
    """`(16, 12, 12)`, `[16, 12, 12]` or `"16-12-12"` as a tuple; ConfigError for anything else."""
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
        raise ConfigError(f"pooling_shape {shape!r} makes more than {2**20} video tokens")
    return (sizes[0], sizes[1], sizes[2])


def read_json(path: str | os.PathLike[str], distinct_keys: bool = False) -> dict[str, Any]:
    """The JSON object in a small file of a checkpoint directory. Raises ConfigError as `json_file.read_json` does."""
    return read_object(path, _MAX_JSON_BYTES, distinct_keys)


def _image_settings(directory: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every place of a checkpoint directory that states image settings, and what it states.

    Published checkpoints have them in preprocessor_config.json. `save_pretrained` of transformers 5 writes them into
    processor_config.json, under "image_processor"; a processor of videos has its own beside them.
    """
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        if os.path.lexists(directory / name):
            yield str(directory / name), read_json(directory / name)
    processor = _processor(directory)
    for key in ("image_processor", "video_processor"):
        settings, where = processor.get(key), f"{directory / 'processor_config.json'} ({key})"
        if settings is not None:
            if not isinstance(settings, dict):
                raise ConfigError(f"{where} is {settings!r}; it must be a JSON object of image settings")
            yield where, settings


def _processor(directory: Path) -> Mapping[str, Any]:
    file = directory / "processor_config.json"
    return read_json(file) if os.path.lexists(file) else {}


def _shortest_edge(directory: Path, image_size: int) -> int:
    """What PLLaVA's own processor_config.json says beside the image settings, in pixels."""
    edge = _processor(directory).get("shortest_edge", image_size)
    if not isinstance(edge, int) or isinstance(edge, bool) or not 1 <= edge <= 4096:
        where = directory / "processor_config.json"
        raise ConfigError(f"{where} says shortest_edge {edge!r}; it must be a number of pixels from 1 to 4096")
    return edge


def _normalised(raw: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """Image settings with the defaults where none are stated, and each in one form of those that transformers reads."""
    crop, size = raw.get("crop_size", image_size), raw.get("size", image_size)
    if isinstance(crop, dict) and {"height"} <= crop.keys() and all(side == crop["height"] for side in crop.values()):
        crop = crop["height"]
    if isinstance(size, dict) and size.keys() == {"shortest_edge"}:
        size = size["shortest_edge"]
    return {
        **{key: raw.get(key, only) for key, only in _PREPROCESSING.items()},
        "size": size,
        "crop_size": crop,
        "image_mean": raw.get("image_mean", list(PreprocessorConfig.image_mean)),
        "image_std": raw.get("image_std", list(PreprocessorConfig.image_std)),
    }


def _checked_settings(
    settings: Mapping[str, Any], where: str, image_size: int
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and deviation of normalised image settings that PLLaVA's pipeline can follow."""
    for key, only in _PREPROCESSING.items():
        if settings[key] != only:
            raise ConfigError(f"{where}: {key} is {settings[key]!r}; PLLaVA's pipeline has only {only!r}")
    size, crop = settings["size"], settings["crop_size"]
    if size != image_size or crop != image_size:
        raise ConfigError(
            f"{where} resizes to {size} and crops to {crop} pixels; the vision tower needs {image_size} for both"
        )
    mean, std = settings["image_mean"], settings["image_std"]
    if not _are_numbers(mean, 3) or not _are_numbers(std, 3) or min(std) <= 0:
        raise ConfigError(f"{where}: image_mean and image_std must be three numbers each, image_std above zero")
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def _section(raw: Mapping[str, Any], name: str, default: dict[str, Any] | None = None) -> Mapping[str, Any]:
    section = raw.get(name)
    if section is None and default is not None:
        return default
    if not isinstance(section, dict):
        raise ConfigError(
            f"config.json has no {name} that is a JSON object; PLLaVA needs text_config and vision_config"
        )
    return section


def _refuse_unsupported(raw: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    checks = [
        ("text_config.model_type", text.get("model_type", "llama"), ("llama",)),
        ("text_config.hidden_act", text.get("hidden_act", "silu"), ("silu",)),
        ("text_config.attention_bias", text.get("attention_bias", False), (False,)),
        ("text_config.mlp_bias", text.get("mlp_bias", False), (False,)),
        ("tie_word_embeddings", text.get("tie_word_embeddings", False), (False,)),
        ("projector_hidden_act", raw.get("projector_hidden_act", "gelu"), ("gelu",)),
        ("vision_feature_select_strategy", raw.get("vision_feature_select_strategy", "default"), ("default",)),
        ("use_pooling", raw.get("use_pooling", True), (True,)),
        ("pooling_method", raw.get("pooling_method", "avg"), ("avg",)),
    ]  # fmt: skip
    for name, value, allowed in checks:
        if value not in allowed:
            raise ConfigError(f"config.json: {name} is {value!r}; only {allowed[0]!r} is supported")
    layer = raw.get("vision_feature_layer", -2)
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise ConfigError(f"config.json: vision_feature_layer is {layer!r}; one layer number is supported")


def _rope_theta(raw: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """The rope_theta inside rope_scaling or rope_parameters, if one is there; transformers 5 prefers it to a plain one.

    Raises ConfigError unless all of these settings scale nothing.
    """
    found: dict[str, Any] = {}
    for section, prefix in ((raw, ""), (text, "text_config.")):
        for name in ("rope_scaling", "rope_parameters"):
            for where, settings in _rope_settings(section.get(name), prefix + name):
                _refuse_rope_scaling(settings, where)
                # The decoder is text_config's: a theta on the top level is only another copy of it.
                if prefix and settings.get("rope_theta") is not None:
                    found[where] = settings["rope_theta"]
    thetas = list(found.values())
    if any(theta != thetas[0] for theta in thetas):
        raise ConfigError(f"config.json: rope_theta differs: {found}; one value serves all layers")
    return {"rope_theta": thetas[0]} if thetas else {}


def _rope_settings(value: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The RoPE settings that a key of config.json holds: none, one object, or one for each type of layer."""
    if value is None:
        return
    if not isinstance(value, dict):
        raise ConfigError(f"config.json: {where} is {value!r}; it must be a JSON object or null")
    if value and all(isinstance(inner, dict) for inner in value.values()):
        for name, inner in value.items():
            yield f"{where}.{name}", inner
    else:
        yield where, value


def _refuse_rope_scaling(settings: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError for RoPE settings that are anything else than LLaMA's own rotation.

    As in transformers 5.9 (modeling_rope_utils.py), "default" has no use for a factor, and "linear" divides by it.
    """
    kinds = {settings[key] for key in ("rope_type", "type") if isinstance(settings.get(key), str)}
    factor = settings.get("factor")
    is_one = isinstance(factor, int | float) and not isinstance(factor, bool) and factor == 1
    allowed = kinds == {"default"} or (kinds == {"linear"} and is_one) or (not kinds and (factor is None or is_one))
    strange = [key for key in ("rope_type", "type") if not isinstance(settings.get(key), str | None)]
    partial = settings.get("partial_rotary_factor") not in (None, 1)
    if not allowed or strange or partial:
        raise ConfigError(
            f"config.json: {where} is {dict(settings)!r}; only settings that scale nothing are supported: null, "
            "rope_type 'default', or 'linear' with factor 1"
        )


def _known(cls: type, raw: Mapping[str, Any], also: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The keys of `raw` that are fields of the dataclass `cls`; null means absent, as in transformers."""
    merged = {**raw, **(also or {})}
    return {k: merged[k] for k in cls.__dataclass_fields__ if merged.get(k) is not None}  # type: ignore[attr-defined]


def _first(*sources: Mapping[str, Any], key: str, default: Any) -> Any:
    return next((s[key] for s in sources if s.get(key) is not None), default)


def _notice(raw: Mapping[str, Any]) -> str:
    """The notice of config.json as one printable line."""
    notice = raw.get("notice", "")
    if not isinstance(notice, str) or len(notice) > _LONGEST_NOTICE:
        raise ConfigError(f"config.json: notice must be a text of at most {_LONGEST_NOTICE} characters")
    return "".join(letter if letter.isprintable() else " " for letter in notice).strip()


def _stored_dtype(raw: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    stored = _first(raw, raw, text, text, key="torch_dtype", default=None) or _first(
        raw, text, key="dtype", default="float32"
    )
    return check_choice("config.json: torch_dtype", str(stored).removeprefix("torch."), DTYPES[1:])


def _check_sizes(section: str, config: Any) -> None:
    for name, entry in config.__dataclass_fields__.items():
        value = getattr(config, name)
        if entry.type is int or entry.type == "int":
            check_whole_number(f"{section}.{name}", value, 1, _LARGEST.get(name, _LARGEST_SIZE))
        elif (entry.type is float or entry.type == "float") and (not _are_numbers((value,), 1) or not 0 < value < 1e12):
            raise ConfigError(f"{section}.{name} is {value!r}; it must be a number above 0")


def _are_numbers(values: object, count: int) -> bool:
    return (
        isinstance(values, list | tuple)
        and len(values) == count
        and all(isinstance(v, int | float) and not isinstance(v, bool) and isfinite(v) for v in values)
    )

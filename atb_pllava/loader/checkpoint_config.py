"""Reads config.json and the other JSON files of a checkpoint into PllavaConfig and PreprocessorConfig.

The other files are generation_config.json, preprocessor_config.json, video_preprocessor_config.json and
processor_config.json. Keys without effect on PLLaVA's results are ignored. Published files have many such keys. Keys
for features that PLLaVA does not have raise ConfigError.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from math import isfinite
from pathlib import Path
from typing import Any

from atb_pllava.config import (
    DTYPE_CHOICES,
    PllavaConfig,
    PreprocessorConfig,
    TextConfig,
    VisionConfig,
    check_choice,
    check_pooling_shape,
)
from atb_pllava.errors import ConfigError
from atb_pllava.files import read_config_json
from atb_pllava.loader.directory import check_directory, check_has_config

MODEL_TYPES = ("llava", "pllava", "llava_next")

_LONGEST_NOTICE = 500  # characters

# The only values PLLaVA's image pipeline has for these keys of preprocessor_config.json. 3 is Pillow's bicubic filter.
_PREPROCESSING = {
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
}


def read_config(model_dir: str | os.PathLike[str], option: str = "--model_path") -> PllavaConfig:
    """Read config.json and, if it exists, generation_config.json of a checkpoint directory.

    `option` is the command line option that named the directory, for messages.
    Raises ConfigError if `model_dir` is no checkpoint directory, and as `config_from_json` does.
    """
    directory = check_directory(model_dir, option)
    raw = read_config_json(check_has_config(directory, option))
    generation = directory / "generation_config.json"
    return config_from_json(raw, read_config_json(generation) if os.path.lexists(generation) else None)


def config_from_json(raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> PllavaConfig:
    """The configuration in the contents of config.json (`raw`) and generation_config.json (`generation`).

    Raises ConfigError for a model_type other than PLLaVA's or LLaVA's and for impossible sizes. ConfigError is also
    raised for LLaMA features that PLLaVA does not have: tied embeddings, biases, scaled RoPE.
    """
    if raw.get("model_type") not in MODEL_TYPES:
        raise ConfigError(
            f"config.json says model_type {raw.get('model_type')!r}; PLLaVA checkpoints say one of "
            f"{', '.join(MODEL_TYPES)}"
        )
    text = _section(raw, "text_config")
    vision = _section(raw, "vision_config")
    _refuse_unsupported(raw, text)
    eos = _first_stated("eos_token_id", generation or {}, text, default=2)
    return PllavaConfig(
        vision=VisionConfig(**_fields_of(VisionConfig, vision)),
        text=TextConfig(**{**_fields_of(TextConfig, text), **_nested_rope_theta(raw, text)}),
        image_token_index=raw.get("image_token_index", raw.get("image_token_id", PllavaConfig.image_token_index)),
        num_frames=raw.get("num_frames", PllavaConfig.num_frames),
        pooling_shape=check_pooling_shape(raw.get("pooling_shape", PllavaConfig.pooling_shape)),
        vision_feature_layer=raw.get("vision_feature_layer", PllavaConfig.vision_feature_layer),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else (eos,),
        dtype=_stored_dtype(raw, text),
        notice=_notice(raw),
    )


def read_preprocessor_config(model_dir: str | os.PathLike[str], image_size: int) -> PreprocessorConfig:
    """Read the image settings and PLLaVA's shortest_edge of a checkpoint directory. CLIP's values are the defaults.

    Raises ConfigError for a setting that PLLaVA's pipeline does not have, and for a crop that is not `image_size`
    pixels. Raises ConfigError if two places in the directory state different values (see `_image_settings`).
    """
    directory = Path(model_dir)
    stated = {where: _normalised(raw, image_size) for where, raw in _image_settings(directory)}
    edge = _shortest_edge(directory, image_size)
    if not stated:
        return PreprocessorConfig(image_size, edge)
    first_place, settings = next(iter(stated.items()))
    for place, others in stated.items():
        for key, value in others.items():
            if value != settings[key]:
                raise ConfigError(
                    f"{first_place} says {key} {settings[key]!r} and {place} says {value!r}; "
                    "remove the one that does not belong to these weights"
                )
    mean, std = _mean_and_std(settings, first_place, image_size)
    return PreprocessorConfig(image_size, edge, mean, std)


# config.json


def _section(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = raw.get(name)
    if not isinstance(section, dict):
        raise ConfigError(
            f"config.json has no {name} that is a JSON object; PLLaVA needs text_config and vision_config"
        )
    return section


def _fields_of(cls: type[TextConfig] | type[VisionConfig], section: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a section of config.json that are fields of `cls`. null means absent, as in transformers."""
    return {field.name: section[field.name] for field in fields(cls) if section.get(field.name) is not None}


def _first_stated(key: str, *sources: Mapping[str, Any], default: Any) -> Any:
    """The value of `key` in the first source that has one, else `default`. null means absent."""
    return next((source[key] for source in sources if source.get(key) is not None), default)


def _refuse_unsupported(raw: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """Raises ConfigError for a key with a value that this package does not support."""
    only_values = [
        (text, "text_config.model_type", "llama"),
        (text, "text_config.hidden_act", "silu"),
        (text, "text_config.attention_bias", False),
        (text, "text_config.mlp_bias", False),
        (text, "tie_word_embeddings", False),
        (raw, "projector_hidden_act", "gelu"),
        (raw, "vision_feature_select_strategy", "default"),
        (raw, "use_pooling", True),
        (raw, "pooling_method", "avg"),
    ]
    for section, name, only in only_values:
        value = section.get(name.removeprefix("text_config."), only)
        if value != only:
            raise ConfigError(f"config.json: {name} is {value!r}; only {only!r} is supported")
    layer = raw.get("vision_feature_layer", PllavaConfig.vision_feature_layer)
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise ConfigError(f"config.json: vision_feature_layer is {layer!r}; one layer number is supported")


def _nested_rope_theta(raw: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """`{"rope_theta": value}` if rope_scaling or rope_parameters of text_config has a rope_theta, else an empty dict.

    As in transformers 5, the nested value overrides rope_theta of text_config. Raises ConfigError if any RoPE setting
    scales positions, and if two nested values differ.
    """
    found: dict[str, Any] = {}
    for section, prefix in ((raw, ""), (text, "text_config.")):
        for name in ("rope_scaling", "rope_parameters"):
            for where, settings in _rope_settings(section.get(name), prefix + name):
                _refuse_rope_scaling(settings, where)
                # The decoder uses the rope_theta of text_config, and the top level repeats the value.
                if prefix and settings.get("rope_theta") is not None:
                    found[where] = settings["rope_theta"]
    thetas = list(found.values())
    if any(theta != thetas[0] for theta in thetas):
        raise ConfigError(f"config.json: rope_theta differs: {found}; one value serves all layers")
    return {"rope_theta": thetas[0]} if thetas else {}


def _rope_settings(value: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The RoPE settings in the value of one key: none, one object, or one object for each type of layer."""
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
    """Raises ConfigError unless the RoPE settings are LLaMA's plain rotation.

    As in transformers 5.9 (modeling_rope_utils.py), type "default" ignores a factor, and "linear" divides by the
    factor.
    """
    types = [settings.get("rope_type"), settings.get("type")]
    named = {value for value in types if isinstance(value, str)}
    factor = settings.get("factor")
    is_one = isinstance(factor, int | float) and not isinstance(factor, bool) and factor == 1
    scales_nothing = (
        named == {"default"} or (named == {"linear"} and is_one) or (not named and (factor is None or is_one))
    )
    has_strange_type = any(not isinstance(value, str | None) for value in types)
    is_partial = settings.get("partial_rotary_factor") not in (None, 1)
    if not scales_nothing or has_strange_type or is_partial:
        raise ConfigError(
            f"config.json: {where} is {dict(settings)!r}; only settings that scale nothing are supported: null, "
            "rope_type 'default', or 'linear' with factor 1"
        )


def _stored_dtype(raw: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    """The dtype of the stored weights. transformers 5 writes `dtype`, earlier versions `torch_dtype`."""
    new_name = _first_stated("dtype", raw, text, default="float32")
    stored = _first_stated("torch_dtype", raw, text, default=new_name)
    return check_choice("config.json: torch_dtype", str(stored).removeprefix("torch."), DTYPE_CHOICES[1:])


def _notice(raw: Mapping[str, Any]) -> str:
    """The notice of config.json as one printable line."""
    notice = raw.get("notice", "")
    if not isinstance(notice, str) or len(notice) > _LONGEST_NOTICE:
        raise ConfigError(f"config.json: notice must be a text of at most {_LONGEST_NOTICE} characters")
    return "".join(letter if letter.isprintable() else " " for letter in notice).strip()


# Image settings


def _image_settings(directory: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each place of a checkpoint directory that states image settings, with the settings.

    Published checkpoints have them in preprocessor_config.json. `save_pretrained` of transformers 5 writes them to
    processor_config.json under "image_processor". The video processor's settings are in
    video_preprocessor_config.json or under "video_processor". Raises ConfigError for settings that are no JSON object.
    """
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        if os.path.lexists(directory / name):
            yield str(directory / name), read_config_json(directory / name)
    processor = _processor(directory)
    for key in ("image_processor", "video_processor"):
        settings = processor.get(key)
        where = f"{directory / 'processor_config.json'} ({key})"
        if settings is not None:
            if not isinstance(settings, dict):
                raise ConfigError(f"{where} is {settings!r}; it must be a JSON object of image settings")
            yield where, settings


def _processor(directory: Path) -> Mapping[str, Any]:
    file = directory / "processor_config.json"
    return read_config_json(file) if os.path.lexists(file) else {}


def _shortest_edge(directory: Path, image_size: int) -> int:
    """shortest_edge of PLLaVA's processor_config.json, in pixels. The default is `image_size`."""
    edge = _processor(directory).get("shortest_edge", image_size)
    if not isinstance(edge, int) or isinstance(edge, bool) or not 1 <= edge <= 4096:
        where = directory / "processor_config.json"
        raise ConfigError(f"{where} says shortest_edge {edge!r}; it must be a number of pixels from 1 to 4096")
    return edge


def _normalised(raw: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """Image settings with defaults filled in. A size such as {"shortest_edge": 336} becomes a number.

    Other dicts of sizes stay as they are, and `_mean_and_std` refuses them.
    """
    crop = raw.get("crop_size", image_size)
    if isinstance(crop, dict) and {"height"} <= crop.keys() and all(side == crop["height"] for side in crop.values()):
        crop = crop["height"]
    size = raw.get("size", image_size)
    if isinstance(size, dict) and size.keys() == {"shortest_edge"}:
        size = size["shortest_edge"]
    return {
        **{key: raw.get(key, only) for key, only in _PREPROCESSING.items()},
        "size": size,
        "crop_size": crop,
        "image_mean": raw.get("image_mean", list(PreprocessorConfig.image_mean)),
        "image_std": raw.get("image_std", list(PreprocessorConfig.image_std)),
    }


def _mean_and_std(
    settings: Mapping[str, Any], where: str, image_size: int
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """image_mean and image_std of normalised settings. Raises ConfigError if PLLaVA's pipeline has no such setting."""
    for key, only in _PREPROCESSING.items():
        if settings[key] != only:
            raise ConfigError(f"{where}: {key} is {settings[key]!r}; PLLaVA's pipeline has only {only!r}")
    size = settings["size"]
    crop = settings["crop_size"]
    if size != image_size or crop != image_size:
        raise ConfigError(
            f"{where} resizes to {size} and crops to {crop} pixels; the vision tower needs {image_size} for both"
        )
    mean = settings["image_mean"]
    std = settings["image_std"]
    if not _are_three_numbers(mean) or not _are_three_numbers(std) or min(std) <= 0:
        raise ConfigError(f"{where}: image_mean and image_std must be three numbers each, image_std above zero")
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def _are_three_numbers(values: object) -> bool:
    return (
        isinstance(values, list | tuple)
        and len(values) == 3
        and all(isinstance(v, int | float) and not isinstance(v, bool) and isfinite(v) for v in values)
    )

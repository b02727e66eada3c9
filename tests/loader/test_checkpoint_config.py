"""A checkpoint's JSON files and the values of the configurations: defaults, other spellings, refusals."""

import json
from pathlib import Path
from typing import Any

import pytest

from atb_pllava.config import EngineConfig, PreprocessorConfig, check_pooling_shape
from atb_pllava.errors import ConfigError
from atb_pllava.loader.checkpoint_config import config_from_json, read_config, read_preprocessor_config
from tests.support import raw_config, tokenizer_definition


def test_published_7b_relies_on_llama_defaults() -> None:
    raw = {
        "model_type": "llava", "architectures": ["PlavaForConditionalGeneration"], "image_token_index": 32000,
        "num_frames": 16, "pooling_shape": [16, 12, 12], "torch_dtype": "bfloat16", "slide_pooling_shape": [16, 2, 2],
        "text_config": {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064, "pad_token_id": 0},
        "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                          "num_attention_heads": 16, "image_size": 336, "patch_size": 14},
    }  # fmt: skip
    config = config_from_json(raw)
    text = config.text
    assert (text.hidden_size, text.intermediate_size, text.num_hidden_layers) == (4096, 11008, 32)
    assert (text.num_key_value_heads, text.head_dim, text.rope_theta) == (32, 128, 10000.0)
    assert config.vision_layers_used == 23 and config.vision.grid == 24 and config.num_video_tokens == 2304
    assert config.dtype == "bfloat16" and config.eos_token_ids == (2,) and config.vision.hidden_act == "quick_gelu"


def test_other_spellings() -> None:
    raw = raw_config(rope_parameters={"rope_type": "default", "rope_theta": 5e6}, eos_token_id=7)
    raw["dtype"] = "float16"
    raw["image_token_id"] = raw.pop("image_token_index")
    config = config_from_json(raw, {"eos_token_id": [7, 8]})
    assert (config.text.rope_theta, config.dtype, config.eos_token_ids) == (5e6, "float16", (7, 8))
    assert config.image_token_index == 300


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model_type", "qwen2_vl", "model_type 'qwen2_vl'"),
        ("text_config", None, "no text_config"),
        ("vision_config", [], "no vision_config"),
        ("text_config.hidden_size", -1, "hidden_size is -1"),
        ("text_config.hidden_size", "64", "hidden_size is '64'"),
        ("text_config.hidden_size", 66, "not a multiple"),
        ("text_config.hidden_size", 2**40, "hidden_size is"),
        ("text_config.num_hidden_layers", 0, "num_hidden_layers is 0"),
        ("text_config.num_hidden_layers", 10**6, "num_hidden_layers is"),
        ("text_config.num_key_value_heads", 3, "num_attention_heads 4 is not a multiple"),
        ("text_config.num_attention_heads", 0, "num_attention_heads is 0"),
        ("text_config.rms_norm_eps", "tiny", "rms_norm_eps is 'tiny'"),
        ("text_config.rope_scaling", {"type": "linear", "factor": 2}, "rope_scaling"),
        ("text_config.tie_word_embeddings", True, "tie_word_embeddings"),
        ("text_config.hidden_act", "gelu", "hidden_act"),
        ("text_config.head_dim", 15, "odd"),
        ("vision_config.image_size", 60, "not a multiple of patch_size"),
        ("vision_config.num_attention_heads", 3, "not a multiple"),
        ("vision_config.hidden_act", "relu", "hidden_act 'relu'"),
        ("vision_feature_layer", -9, "vision_feature_layer -9 does not exist"),
        ("vision_feature_layer", [-2, -3], "vision_feature_layer"),
        ("vision_feature_select_strategy", "full", "vision_feature_select_strategy"),
        ("projector_hidden_act", "relu", "projector_hidden_act"),
        ("image_token_index", 304, "image_token_index is 304; it must be an integer from 0 to 303"),
        ("num_frames", 0, "num_frames is 0"),
        ("pooling_shape", [2, 0, 2], "pooling_shape"),
        ("text_config.rope_parameters", 5, "rope_parameters"),
        ("text_config.rope_parameters", {"type": "linear", "factor": 2}, "rope_parameters is .*linear"),
        ("torch_dtype", "int4", "torch_dtype is 'int4'"),
    ],
)
def test_impossible_configs(path: str, value: Any, message: str) -> None:
    raw = raw_config()
    *section, key = path.split(".")
    (raw[section[0]] if section else raw)[key] = value
    with pytest.raises(ConfigError, match=message):
        config_from_json(raw)


@pytest.mark.parametrize("shape", [(16, 12, 12), [16, 12, 12], "16-12-12", "16x12x12"])
def test_pooling_shapes(shape: Any) -> None:
    assert check_pooling_shape(shape) == (16, 12, 12)


@pytest.mark.parametrize(
    "shape",
    [
        (0, 12, 12),
        "16-0-12",
        "16-12",
        (16, 12, 12, 12),
        "a-b-c",
        None,
        (1.5, 2, 2),
        7,
        (True, 2, 2),
        (4096, 4096, 4096),
        "-1-2-3",
    ],
)
def test_bad_pooling_shapes(shape: Any) -> None:
    with pytest.raises(ConfigError, match="pooling_shape"):
        check_pooling_shape(shape)


def test_arguments_override_the_file() -> None:
    config = config_from_json(raw_config())
    assert config.with_video().pooling_shape == (2, 2, 2)
    assert config.with_video(8, "8-4-4").num_video_tokens == 128
    for bad in (0, -1, 5000, "4", 2.0, True):
        with pytest.raises(ConfigError, match="num_frames"):
            config.with_video(num_frames=bad)  # type: ignore[arg-type]


def test_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a readable directory"):
        read_config(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="config.json does not exist"):
        read_config(tmp_path)
    for content, message in [
        ("{", "not valid JSON"),
        ("[1]", "must contain a JSON object"),
        ("[" * 100000, "not valid"),
        ('{"a": "' + "x" * (11 << 20) + '"}', "larger than 10 MiB"),
    ]:
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ConfigError, match=message):
            read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw_config()))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert read_config(tmp_path).eos_token_ids == (9,)


def test_preprocessor(tmp_path: Path) -> None:
    assert read_preprocessor_config(tmp_path, 336) == PreprocessorConfig()
    (tmp_path / "preprocessor_config.json").write_text('{"crop_size": {"height": 112}, "size": {"shortest_edge": 112}}')
    assert read_preprocessor_config(tmp_path, 112).crop_size == 112
    with pytest.raises(ConfigError, match="crops to 112 pixels; the vision tower needs 336"):
        read_preprocessor_config(tmp_path, 336)
    for odd in (
        '{"image_mean": [1, 2]}',
        '{"image_mean": 5}',
        '{"image_std": [1, 0, 1]}',
        '{"image_mean": [NaN, 0, 0]}',
    ):
        (tmp_path / "preprocessor_config.json").write_text(odd)
        with pytest.raises(ConfigError, match="three numbers"):
            read_preprocessor_config(tmp_path, 336)
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": false}')
    with pytest.raises(ConfigError, match="do_normalize is False"):
        read_preprocessor_config(tmp_path, 336)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    (tmp_path / "processor_config.json").write_text('{"shortest_edge": -5}')
    with pytest.raises(ConfigError, match="shortest_edge"):
        read_preprocessor_config(tmp_path, 336)


NESTED = {
    "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True, "resample": 3,
    "rescale_factor": 1 / 255, "size": {"shortest_edge": 112}, "crop_size": {"height": 112, "width": 112},
    "image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.2, 0.1], "image_processor_type": "CLIPImageProcessor",
}  # fmt: skip


def write_processor(folder: Path, **contents: Any) -> None:
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "LlavaProcessor", **contents}))


@pytest.mark.parametrize("key", ["image_processor", "video_processor"])
def test_image_settings_as_transformers_5_nests_them(tmp_path: Path, key: str) -> None:
    write_processor(tmp_path, **{key: NESTED}, shortest_edge=100)
    found = read_preprocessor_config(tmp_path, 112)
    assert found == PreprocessorConfig(112, 100, (0.5, 0.4, 0.3), (0.3, 0.2, 0.1))
    for change, message in [
        ({"crop_size": {"height": 112, "width": 100}}, "crops to .* the vision tower needs 112"),
        ({"size": {"height": 112, "width": 112}}, "resizes to .*height"),
        ({"size": {"shortest_edge": 336}}, "resizes to 336 and crops to 112 pixels; the vision tower needs 112"),
        ({"resample": 2}, "resample is 2; PLLaVA's pipeline has only 3"),
        ({"rescale_factor": 1}, "rescale_factor is 1"),
        ({"do_center_crop": False}, "do_center_crop is False"),
        ({"do_normalize": None}, "do_normalize is None"),
        ({"image_mean": [0.5]}, "three numbers each"),
        ({"image_std": [0.5, 0, 0.5]}, "three numbers each"),
    ]:
        write_processor(tmp_path, **{key: {**NESTED, **change}})
        with pytest.raises(ConfigError, match=message) as caught:
            read_preprocessor_config(tmp_path, 112)
        assert f"processor_config.json ({key})" in str(caught.value)
    write_processor(tmp_path, **{key: [1]})
    with pytest.raises(ConfigError, match="must be a JSON object of image settings"):
        read_preprocessor_config(tmp_path, 112)
    write_processor(tmp_path, **{key: None})
    assert read_preprocessor_config(tmp_path, 112) == PreprocessorConfig(112, 112)


@pytest.mark.parametrize("beside", ["preprocessor_config.json", "video_preprocessor_config.json", "video_processor"])
def test_two_places_with_image_settings_must_agree(tmp_path: Path, beside: str) -> None:
    def write(other: dict[str, Any]) -> None:
        if beside.endswith(".json"):
            (tmp_path / beside).write_text(json.dumps(other))
            write_processor(tmp_path, image_processor=NESTED)
        else:
            write_processor(tmp_path, image_processor=NESTED, **{beside: other})

    # The same settings in the other spellings that transformers reads.
    write({**NESTED, "size": 112, "crop_size": 112, "do_convert_rgb": True})
    assert read_preprocessor_config(tmp_path, 112).image_mean == (0.5, 0.4, 0.3)
    for key, value in [
        ("image_mean", [0.4, 0.4, 0.3]),
        ("image_std", [0.3, 0.2, 0.2]),
        ("crop_size", 336),
        ("size", {"shortest_edge": 336}),
        ("resample", 2),
        ("do_normalize", False),
    ]:
        write({**NESTED, key: value})
        with pytest.raises(ConfigError, match=f"says {key} .* says ") as caught:
            read_preprocessor_config(tmp_path, 112)
        assert beside in str(caught.value) and "processor_config.json (image_processor)" in str(caught.value)
    # What one place leaves out is CLIP's default there.
    write({"size": 112, "crop_size": 112})
    with pytest.raises(ConfigError, match="says image_mean"):
        read_preprocessor_config(tmp_path, 112)


def test_settings_that_transformers_saves(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if not hasattr(transformers, "CLIPImageProcessorPil"):
        pytest.skip("transformers before 5 writes preprocessor_config.json")
    images = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 112}, crop_size=112, image_mean=[0.5, 0.4, 0.3], image_std=[0.3, 0.2, 0.1]
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_definition()))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    transformers.LlavaProcessor(images, tokenizer, patch_size=14).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    assert read_preprocessor_config(tmp_path, 112).image_mean == (0.5, 0.4, 0.3)
    assert read_preprocessor_config(tmp_path, 112).image_std == (0.3, 0.2, 0.1)


PLAIN = [
    None, {}, {"rope_type": "default"}, {"type": "default"}, {"rope_type": "default", "type": "default", "factor": 1.0},
    {"rope_type": "default", "factor": 4.0}, {"rope_type": "linear", "factor": 1.0}, {"type": "linear", "factor": 1},
    {"rope_theta": 10000.0}, {"full_attention": {"rope_type": "default"}, "sliding_attention": {"type": "default"}},
    {"rope_type": None, "type": "default"}, {"rope_type": "default", "partial_rotary_factor": 1.0},
]  # fmt: skip
SCALED = [
    {"type": "linear", "factor": 2.0}, {"rope_type": "linear"}, {"rope_type": "dynamic", "factor": 1.0},
    {"rope_type": "yarn", "factor": 1.0}, {"rope_type": "llama3", "factor": 8.0}, {"rope_type": "longrope"},
    {"rope_type": "default", "type": "linear", "factor": 2.0}, {"factor": 2.0}, {"rope_type": "Default"}, "default", 1,
    False, [], {"rope_type": 5}, {"rope_type": "linear", "factor": True}, {"rope_type": "linear", "factor": "1"},
    {"rope_type": "linear", "factor": float("nan")}, {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "linear", "factor": 2.0}},
    {"full_attention": {"rope_type": "default", "rope_theta": 1e4}, "other": {"type": "default", "rope_theta": 1e6}},
]  # fmt: skip


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("top", [False, True], ids=["text_config", "top level"])
def test_rope_settings_count_only_where_they_scale_nothing(name: str, top: bool) -> None:
    plain = config_from_json(raw_config())
    for settings in PLAIN:
        raw = {**raw_config(), name: settings} if top else raw_config(**{name: settings})
        assert config_from_json(raw) == plain
    for settings in SCALED:
        raw = {**raw_config(), name: settings} if top else raw_config(**{name: settings})
        if top and "rope_theta" in str(settings):
            continue  # thetas on the top level are copies for other readers
        with pytest.raises(ConfigError, match=f"config.json: .*({name}|rope_theta differs)"):
            config_from_json(raw)


@pytest.mark.parametrize("settings", [s for s in PLAIN if s and "full_attention" not in s and None not in s.values()])
def test_transformers_scales_nothing_there_either(settings: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if not hasattr(transformers, "CLIPImageProcessorPil"):
        pytest.skip("transformers before 5 refuses most of these")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    def frequencies(**rope: Any) -> list[float]:
        made = transformers.LlamaConfig(hidden_size=64, num_attention_heads=4, **rope)
        return list(LlamaRotaryEmbedding(made).inv_freq.tolist())

    assert frequencies(rope_scaling=dict(settings)) == frequencies()


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_a_theta_among_rope_settings_counts(name: str) -> None:
    settings = {"rope_type": "default", "rope_theta": 5e5}
    assert config_from_json(raw_config(**{name: settings}, rope_theta=1e4)).text.rope_theta == 5e5
    both = raw_config(rope_scaling=settings, rope_parameters={**settings, "rope_theta": 1e4})
    with pytest.raises(ConfigError, match="rope_theta differs"):
        config_from_json(both)


@pytest.mark.parametrize("option", ["block_size", "max_batch_size", "prefill_chunk", "max_input_length"])
def test_engine_options(option: str) -> None:
    for bad in (0, -1, 1.5, "8", True):
        with pytest.raises(ConfigError, match=f"{option} is"):
            EngineConfig(**{option: bad})


def test_a_notice_is_one_printable_line() -> None:
    assert config_from_json(raw_config()).notice == ""
    told = config_from_json({**raw_config(), "notice": " only\nshapes\x1b[31m "})
    assert told.notice == "only shapes [31m"
    for wrong in (7, ["a"], "a" * 501):
        with pytest.raises(ConfigError, match="notice must be a text of at most 500 characters"):
            config_from_json({**raw_config(), "notice": wrong})

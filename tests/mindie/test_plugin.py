"""The plugin inside MindIE: prompts, shared memory, both prefills, decode and W8A16 equal the native engine's.

By default MindIE is the stand-in in `tests/mindie_host`, which checks shapes, types and layout of every call and
computes in float32. ATB_LLM_HOME may name a directory that holds a real atb_llm: `examples/atb_models` of a MindIE-LLM
source tree, or the installed one. mindie_llm must be importable too. The tests then run against the real one, in
float16, on the card. They are skipped, with the reason, where it cannot be imported or there is no card.
"""

import errno
import importlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import atb_pllava
from atb_pllava.config import PreprocessorConfig, TextConfig
from atb_pllava.convert.options import ConvertOptions
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.errors import BackendError, ConfigError, PllavaError, RequestError, VideoError, WeightError
from atb_pllava.llm import LLM
from atb_pllava.loader.checkpoint_config import config_from_json, read_config, read_preprocessor_config
from atb_pllava.mindie import segments
from atb_pllava.mindie.host_checks import check_groups, check_head_size, check_model_dir, check_world_size
from atb_pllava.mindie.media_ids import find_blocks, insert_blocks
from atb_pllava.mindie.prompt_builder import PluginOptions, PromptBuilder
from atb_pllava.mindie.quirks import QUIRKS
from atb_pllava.mindie.segments import Segment, read_segment
from atb_pllava.mindie.truncation import Truncation
from atb_pllava.multimodal.pixel_values import pixel_values
from atb_pllava.prompt.messages import parse_chat_messages, parse_content_parts
from tests.host_sources import STAND_IN, link_plugin
from tests.support import IMAGE_ID, convert_checkpoint, raw_config, write_checkpoint, write_video

REAL = os.environ.get("ATB_LLM_HOME")
PLUGIN = Path(atb_pllava.__file__).resolve().parent / "mindie" / "plugin" / "pllava"
DTYPE = "float16" if REAL else "float32"
TOLERANCE = 0.5 if REAL else 1e-4  # of log-probabilities, which span 15 to 20
STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """MindIE's module with ModelRunner. The plugin is linked into its models."""
    farm = tmp_path_factory.mktemp("host")
    home = Path(REAL) if REAL else STAND_IN
    link_plugin(home, farm)
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        if REAL:
            patch.syspath_prepend(home)
        patch.syspath_prepend(farm)
        try:
            runner = importlib.import_module("atb_llm.runner.model_runner")
        except ModuleNotFoundError as missing:
            pytest.skip(f"{home}: atb_llm needs {missing.name}", allow_module_level=True)
        yield runner
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "atb_llm":
            del sys.modules[name]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that are the same in float16 and in float32."""
    path = write_checkpoint(tmp_path_factory.mktemp("source") / "model", {**raw_config(), "torch_dtype": DTYPE})
    file = path / "model.safetensors"
    save_file({name: tensor.half().float() for name, tensor in load_file(file).items()}, file)
    return path


@pytest.fixture(scope="module")
def merged(source: Path) -> Path:
    return convert(source, "pllava_merged")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A video, a video with fewer than four frames, and an image, in the folder where the service keeps media."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("request") / "video"
    folder.mkdir()
    write_video(folder / "1.mp4", seed=1)
    write_video(folder / "2.mp4", frames=3, size=(64, 96), seed=2)
    Image.new("RGB", (90, 70), (10, 200, 60)).save(folder / "3.png")
    return [str(folder / name) for name in ("1.mp4", "2.mp4", "3.png")]


@pytest.fixture(scope="module")
def native(merged: Path) -> LLM:
    return LLM(merged, dtype="float32")


@pytest.fixture
def names(tmp_path: Path) -> Iterator[Path]:
    """The file of segment names. The segments are freed at the end, as MindIE does when a request ends."""
    file = tmp_path / "shm_name.txt"
    yield file
    for name in file.read_text().split() if file.exists() else ():
        (segments.SHARED_MEMORY / name).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def runner(host: Any, merged: Path) -> Any:
    return load(host, merged)


def convert(source: Path, kind: str, **options: Any) -> Path:
    result = source.with_name("-".join([kind, *map(str, options.values())]))
    convert_checkpoint(source, result, ConvertOptions(kind, lora_alpha=None, **options))
    file = result / "config.json"
    raw = json.loads(file.read_text())
    assert raw["torch_dtype"] == "float16"  # the real host knows no float32
    file.write_text(json.dumps({**raw, "torch_dtype": DTYPE}))
    return result


def load(host: Any, path: Path, world_size: int = 1, **options: Any) -> Any:
    runner = host.ModelRunner(
        str(path),
        0,
        world_size,
        local_rank=0,
        trust_remote_code=False,
        max_batch_size=4,
        num_speculative_tokens=0,
        **options,
    )
    runner.load_weights()
    return runner


def router(path: Path, **options: Any) -> Any:
    return sys.modules["atb_llm.models"].get_model(str(path), **options)


def prompts_of(runner: Any) -> PromptBuilder:
    return runner.model.prompts


def collapse(ids: Sequence[int], path: Path) -> list[int]:
    """A prompt's ids with one image token in place of each block."""
    length = read_config(path).num_video_tokens
    ids = [int(token) for token in ids]
    blocks = find_blocks(ids, IMAGE_ID, length)
    inside = {i for span, _ in blocks for i in range(span.start + 1, span.start + span.length)}
    return [token for i, token in enumerate(ids) if i not in inside]


class Served:
    """Runs a loaded model as MindIE's workers do: one packed prefill of all prompts, then decode steps."""

    BLOCKS = 6
    BLOCK = 128

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.model = runner.model
        self.device = runner.device
        shape = (4 * self.BLOCKS, self.BLOCK, runner.num_kv_heads, runner.head_size)
        empty = {"dtype": runner.dtype, "device": self.device}
        layers = range(runner.num_layers)
        self.cache = [(torch.full(shape, 7.0, **empty), torch.full(shape, 7.0, **empty)) for _ in layers]

    def prefill(self, prompts: Sequence[Any]) -> torch.Tensor:
        """Logits of prompts: lists of token ids, as the service passes them, or embeddings [n, hidden]."""
        lengths = [len(prompt) for prompt in prompts]
        if isinstance(prompts[0], torch.Tensor):
            inputs = torch.cat(list(prompts)) if len(prompts) > 1 else prompts[0]
        else:
            inputs = self.tensor([token for prompt in prompts for token in prompt])
        positions = [i for length in lengths for i in range(length)]
        slots = [self.slot(row, i) for row, length in enumerate(lengths) for i in range(length)]
        ends = [sum(lengths[: row + 1]) - 1 for row in range(len(prompts))]
        return self.forward(inputs, positions, slots, lengths, True, self.tensor(ends, torch.int32))

    def decode(self, tokens: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """Logits of one step with one token of each sequence. `lengths` include the new tokens."""
        slots = [self.slot(row, length - 1) for row, length in enumerate(lengths)]
        return self.forward(self.tensor(tokens), [length - 1 for length in lengths], slots, lengths, False, None)

    def generate(self, prompts: Sequence[Any], answers: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Log-probabilities [steps, vocabulary] of each prompt, continued by these tokens."""
        rows = [self.prefill(prompts)]
        lengths = [len(prompt) for prompt in prompts]
        for step in range(len(answers[0]) - 1):
            lengths = [length + 1 for length in lengths]
            rows.append(self.decode([answer[step] for answer in answers], lengths))
        return list(torch.stack(rows, 1).float().log_softmax(-1))

    def forward(
        self, inputs: torch.Tensor, positions: Any, slots: Any, lengths: Any, is_prefill: bool, ends: Any
    ) -> torch.Tensor:
        tables = [[row * self.BLOCKS + i for i in range(self.BLOCKS)] for row in range(len(lengths))]
        logits = self.model.forward(
            input_ids=inputs,
            position_ids=self.tensor(positions),
            is_prefill=is_prefill,
            kv_cache=self.cache,
            block_tables=self.tensor(tables, torch.int32),
            slots=self.tensor(slots),
            input_lengths=self.tensor(lengths),
            max_seq_len=max(lengths),
            lm_head_indices=ends,
            adapter_ids=None,
            is_need_mask=None,
            max_out_len=7,
        )
        assert logits.shape == (len(lengths), self.runner.config.vocab_size)
        return logits.cpu()

    def slot(self, row: int, position: int) -> int:
        return row * self.BLOCKS * self.BLOCK + position

    def tensor(self, values: Any, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device)


@pytest.fixture(scope="module")
def served(runner: Any) -> Served:
    return Served(runner)


def expected(llm: LLM, request: dict[str, Any]) -> tuple[list[int], torch.Tensor]:
    """The native engine's greedy answer, and its log-probabilities [steps, vocabulary]."""
    (answer,) = llm.generate([request], SamplingParams(max_tokens=STEPS, logprobs=-1, ignore_eos=True))
    return answer.token_ids, torch.from_numpy(np.stack(answer.logprobs))


def compare(served: Served, prompts: Sequence[Any], wanted: Sequence[tuple[list[int], torch.Tensor]]) -> None:
    """Assert that MindIE's log-probabilities equal `wanted`, along the native engine's answers, in one batch."""
    rows = served.generate(prompts, [tokens for tokens, _ in wanted])
    for got, (_, logprobs) in zip(rows, wanted, strict=True):
        torch.testing.assert_close(got, logprobs, atol=TOLERANCE, rtol=0)


# Config and directory


def test_config_has_what_the_host_reads(merged: Path) -> None:
    config = router(merged).config
    text = config.text_config
    assert config.model_type == "pllava" and config.model_name_or_path == str(merged)
    for holder in (config, text):
        assert (holder.num_hidden_layers, holder.num_attention_heads, holder.num_key_value_heads) == (2, 4, 2)
        assert (holder.hidden_size, holder.vocab_size, holder.max_position_embeddings) == (64, 304, 1024)
        assert holder.torch_dtype == getattr(torch, DTYPE) and holder.quantize is None
    assert text.model_type == "llama" and text.rms_norm_eps == 1e-5 and config.top_k <= config.vocab_size
    assert config.eos_token_id == config.generation_config.eos_token_id == 2
    assert config.pllava == read_config(merged)


def test_the_longest_sequence_reaches_the_rotary_table(merged: Path) -> None:
    config = router(merged, max_position_embeddings=3000).config
    assert config.text_config.max_position_embeddings == config.max_position_embeddings == 3000


@pytest.mark.parametrize("asymmetric", [False, True])
def test_quantised_directories(source: Path, asymmetric: bool) -> None:
    config = router(convert(source, "pllava_w8a16", symmetric=not asymmetric)).config
    assert config.quantize == config.text_config.quantize == "w8a16"
    assert config.text_config.quantization_config.group_size == 0


def test_published_directories_are_told_what_to_do(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="convert_quant_weights.sh -src .* -type pllava_merged"):
        check_model_dir(source)
    disguised = tmp_path / "pllava-7b"
    shutil.copytree(source, disguised)
    raw = json.loads((disguised / "config.json").read_text())
    (disguised / "config.json").write_text(json.dumps({**raw, "model_type": "pllava", "pooling_shape": [0, 1, 1]}))
    with pytest.raises(ConfigError, match="pooling_shape"):  # and not a config without it
        _ = router(disguised).config


def test_names_only_we_understand_are_refused_before_loading(host: Any, merged: Path, tmp_path: Path) -> None:
    path = tmp_path / "renamed"
    path.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(merged / name, path)
    (file,) = merged.glob("*.safetensors")
    wrapped = {
        name.replace("language_model.", "language_model.base_model.model."): t for name, t in load_file(file).items()
    }
    save_file(wrapped, path / "model.safetensors")
    with pytest.raises(WeightError, match="base_model.*convert_quant_weights.sh"):
        load(host, path)
    wrapped.pop(next(name for name in wrapped if name.startswith("vision_tower")))
    wrapped = {name.replace("base_model.model.", ""): tensor for name, tensor in wrapped.items()}
    save_file(wrapped, path / "model.safetensors")
    with pytest.raises(WeightError, match="missing tensors"):
        load(host, path)


def test_world_sizes() -> None:
    def sizes(heads: int, kv_heads: int) -> list[int]:
        text = TextConfig(hidden_size=heads * 4, num_attention_heads=heads, num_key_value_heads=kv_heads)
        good = []
        for size in range(10):
            try:
                check_world_size(size, text)
                good.append(size)
            except ConfigError as error:
                assert f"worldSize is {size}" in str(error)
        return good

    # What was computed right and wrong by the real host over that many ranks.
    assert sizes(32, 32) == sizes(40, 40) == sizes(4, 4) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert sizes(56, 8) == [1, 2, 4, 8] and sizes(8, 2) == [1, 2, 4, 8]
    assert sizes(6, 2) == [1, 2, 6] and sizes(14, 2) == [1, 2]


def test_head_sizes() -> None:
    check_head_size(TextConfig(hidden_size=64, num_attention_heads=4, head_dim=16))
    with pytest.raises(ConfigError, match="head_dim 32.*16 here"):
        check_head_size(TextConfig(hidden_size=64, num_attention_heads=4, head_dim=32))


def test_groups_over_cards() -> None:
    text = TextConfig(hidden_size=4096, intermediate_size=11008)  # 64 and 172 groups of 64
    for size in (1, 2, 4):
        check_groups(size, text, 64)
    check_groups(8, text, 0)
    for size, columns in [(3, 4096), (8, 11008)]:
        with pytest.raises(ConfigError, match=f"worldSize is {size}.* {columns} columns"):
            check_groups(size, text, 64)


def test_what_the_model_does_not_have_is_refused(host: Any, merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = {"lora_modules": '{"a": "b"}'} if REAL else {"lora_adapter": {"a": "b"}}
    for option in (lora, {"inference_mode": SimpleNamespace(enable_prefill_pa=True)}):
        with pytest.raises(ConfigError, match="has no"):
            load(host, merged, **option)
    if not REAL:
        with pytest.raises(ConfigError, match="worldSize is 3"):
            load(host, merged, world_size=3)
        monkeypatch.setattr(sys.modules["atb_llm.models.llama.flash_causal_llama"].Mapping, "pipeline", True)
        with pytest.raises(ConfigError, match="pipeline parallelism"):
            load(host, merged)


def test_a_type_error_is_not_tried_away(host: Any, merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise TypeError("unexpected keyword argument 'rotary'")

    module = importlib.import_module("atb_llm.models.pllava.flash_causal_pllava")
    monkeypatch.setattr(module, "check_features", broken)
    with pytest.raises(BackendError, match="do not fit together.*rotary"):
        load(host, merged)


# Prompts


@pytest.mark.parametrize("question", ["What happens?", "Grüße, 日本 \U0001f600", "a <image> b </s> -123 <s>", " x "])
@pytest.mark.parametrize("media", [[], [0], [0, 1, 2]])
def test_prompt_ids_are_the_native_ones(
    merged: Path, native: LLM, clips: list[str], names: Path, question: str, media: list[int]
) -> None:
    files = [clips[i] for i in media]
    (wanted,) = native.generate(
        [{"question": question, **({"video": files} if files else {})}], SamplingParams(max_tokens=1)
    )
    parts = [{"image" if file.endswith("png") else "video": file} for file in files] + [{"text": question}]
    asked = router(merged)
    ids = asked.tokenize(parts, shm_name_save_path=str(names))
    assert ids.dtype == np.int64 and ids.ndim == 1 and len(ids) == wanted.metrics.prompt_tokens
    assert collapse(ids, merged) == wanted.prompt_token_ids
    chat = asked.input_builder.make_context(0, [{"role": "user", "content": parts}], shm_name_save_path=str(names))
    assert all(type(token) is int for token in chat)
    assert collapse(chat, merged) == wanted.prompt_token_ids
    assert len(names.read_text().split() if files else []) == 2 * len(files)


def test_chat_turns(merged: Path, clips: list[str], names: Path) -> None:
    """Each conversation as the literal prompt it stands for."""
    builder = router(merged).input_builder

    def is_prompt(messages: list[dict[str, Any]], text: str) -> bool:
        ids = builder.make_context(0, messages, shm_name_save_path=str(names))
        return collapse(ids, merged) == builder.prompts.tokenizer.encode(text)

    history = [{"role": "user", "content": [{"video": clips[0]}, {"text": "A"}]}, {"role": "assistant", "content": "B"}]
    later = {"role": "user", "content": [{"text": "C"}, {"image": clips[2]}, {"text": "D"}, {"video": clips[1]}]}
    told = "USER:<image> A ASSISTANT:B</s>USER:"
    assert is_prompt([{"role": "user", "content": "hi"}], "USER:hi ASSISTANT:")
    assert is_prompt([*history, {"role": "user", "content": "C"}], told + "C ASSISTANT:")
    assert is_prompt([*history, later], told + "<image><image> C\nD ASSISTANT:")
    assert is_prompt(
        [{"role": "system", "content": "be brief"}, *history, later], f"be brief {told}<image><image> C\nD ASSISTANT:"
    )
    assert is_prompt([{"role": "user", "content": "E"}, {"role": "user", "content": "F"}], "USER:E\nF ASSISTANT:")
    assert is_prompt(
        [{"role": "user", "content": [{"video": clips[0]}]}], "USER:<image> Describe this video. ASSISTANT:"
    )
    spelled = builder.make_context(0, [{"role": "system", "content": "<image>"}, {"role": "user", "content": "</s>"}])
    assert IMAGE_ID not in spelled and 2 not in spelled


def test_images_in_a_row_are_one_video(
    served: Served, merged: Path, native: LLM, clips: list[str], names: Path
) -> None:
    """The frames in shared memory are those of the native engine, and so is the answer."""
    image = clips[2]
    other = shutil.copy(image, str(Path(image).with_name("4.png")))
    times = {"video": clips[0], "start_seconds": 0.5, "end_seconds": 1}
    messages = [{"role": "user", "content": [{"image": image}, {"text": "A"}, {"image": other}, times]}]
    wanted = native.prepare({"messages": messages})
    ids = router(merged).input_builder.make_context(0, messages, shm_name_save_path=str(names))
    assert collapse(ids, merged) == wanted.prompt_token_ids and len(wanted.spans) == 2
    blocks = find_blocks(ids, IMAGE_ID, read_config(merged).num_video_tokens)
    preprocessor = read_preprocessor_config(merged, 56)
    found = [read_segment(segment, preprocessor).mm_hash for _, segment in blocks]
    assert found == [video.mm_hash for video in wanted.videos]
    compare(served, [ids], [expected(native, {"messages": messages})])
    assert router(merged).tokenize(messages[0]["content"], shm_name_save_path=str(names)).shape == (len(ids),)


def test_segment_names_are_written_beside_the_images_of_a_sequence(merged: Path, clips: list[str]) -> None:
    builder = router(merged).input_builder
    file = Path(clips[2]).parents[1] / "shm_name.txt"
    try:
        builder.make_context(0, [{"role": "user", "content": [{"image": clips[2]}, {"image": clips[2]}]}])
        (name,) = file.read_text().split()
        (segments.SHARED_MEMORY / name).unlink()
    finally:
        file.unlink(missing_ok=True)


def test_options_of_a_chat_have_an_effect_or_are_refused(merged: Path) -> None:
    builder = router(merged).input_builder
    message = [{"role": "user", "content": "one two three four"}]
    whole = builder.make_context(0, message, chat_template_kwargs={"truncation": 0, "max_length": 9})
    for side, kept in [(1, "four"), (-1, "one"), (True, "one")]:
        ids = builder.make_context(0, message, chat_template_kwargs={"truncation": side, "max_length": len(whole) - 8})
        text = builder.prompts.tokenizer.decode(ids)
        assert len(ids) == len(whole) - 8 and kept in text and text.startswith("USER:") and text.endswith("ASSISTANT:")
    for given in ({"chat_template": "{{ x }}"}, {"enable_thinking": True}, {"tools": []}):
        with pytest.raises(RequestError, match=next(iter(given))):
            builder.make_context(0, message, chat_template_kwargs=given)
    with pytest.raises(RequestError, match="add_generation_prompt"):
        builder.make_context(0, message, False)


def test_truncation_keeps_videos_whole(merged: Path, clips: list[str], names: Path) -> None:
    prompts = PromptBuilder.from_dir(merged, read_config(merged))
    first = {"role": "user", "content": [{"video": clips[0]}, {"text": "a b"}]}
    last = {"role": "user", "content": [{"text": "e f"}, {"video": clips[1]}]}
    dialogue = parse_chat_messages([first, {"role": "assistant", "content": "c d"}, last])
    whole = len(prompts.build(dialogue, names))
    for cut in range(1, 9):
        ids = prompts.build(dialogue, names, Truncation(whole - cut, from_left=True))
        assert len(ids) <= whole - cut and len(find_blocks(ids, IMAGE_ID, 8)) == 2
    with pytest.raises(RequestError, match="even without any question"):
        prompts.build(dialogue, names, Truncation(20, from_left=False))


def test_plugin_options(merged: Path, source: Path) -> None:
    chosen = router(merged, models_dict={"pllava": {"conversation": "demo", "system": "S"}})
    text = chosen.prompts.tokenizer.decode(chosen.tokenize([{"text": "Q"}]).tolist())
    assert text == "S USER:Q ASSISTANT:"
    with pytest.raises(ConfigError, match="models.pllava has colour"):
        _ = router(merged, models_dict={"pllava": {"colour": "red"}}).config
    with pytest.raises(ConfigError, match="34B"):
        _ = router(merged, models_dict={"pllava": {"conversation": "eval_vcg_llavanext"}}).config
    assert PluginOptions.from_host(None) == PluginOptions()


# Shared memory


def write_one(merged: Path, clips: list[str], names: Path) -> Segment:
    prompts = PromptBuilder.from_dir(merged, read_config(merged))
    ids = prompts.build(parse_content_parts([{"video": clips[1]}, {"text": "Q"}]), names)
    ((_, segment),) = find_blocks(ids, IMAGE_ID, 8)
    return segment


def test_frames_arrive_as_they_were(merged: Path, clips: list[str], names: Path) -> None:
    segment = write_one(merged, clips, names)
    file = segments.SHARED_MEMORY / segment.name
    assert names.read_text().split() == [segment.name] and file.stat().st_mode & 0o777 == 0o600
    preprocessor = read_preprocessor_config(merged, 56)
    (wanted,) = PromptBuilder.from_dir(merged, read_config(merged)).processor.prepare([clips[1]])
    got = read_segment(segment, preprocessor)
    assert len(got) == 3 and got.inverse_indices == wanted.inverse_indices
    assert torch.equal(pixel_values(got), pixel_values(wanted))


def test_missing_short_and_foreign_segments_raise(merged: Path, clips: list[str], names: Path) -> None:
    segment = write_one(merged, clips, names)
    preprocessor = PreprocessorConfig(56)
    file = segments.SHARED_MEMORY / segment.name
    content = file.read_bytes()
    for damaged, why in [
        (content[:-1], "bytes"),
        (content + b"x", "bytes"),
        (content[:20], "no complete video"),
        (b"", "no complete"),
        (bytes(8) + content[8:], "no complete video"),
        (content[:32] + b"\x09" + content[33:], "frames it does not"),
    ]:
        file.write_bytes(damaged)
        with pytest.raises(RequestError, match=why):
            read_segment(segment, preprocessor)
    file.unlink()
    with pytest.raises(RequestError, match="gone"):
        read_segment(segment, preprocessor)


def test_names_go_to_the_hosts_file(merged: Path, clips: list[str]) -> None:
    file = Path(clips[0]).parents[1] / "shm_name.txt"
    router(merged).tokenize([{"video": clips[0]}, {"text": "Q"}])
    (name,) = file.read_text().split()
    (segments.SHARED_MEMORY / name).unlink()
    file.unlink()


def test_a_request_that_fails_leaves_nothing(
    merged: Path, clips: list[str], names: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def random_key(limit: int) -> int:
        made.append(randbelow(limit))
        return made[-1]

    made: list[int] = []
    randbelow = segments.secrets.randbelow
    reserve = os.posix_fallocate
    written = segments.write_segment
    monkeypatch.setattr(segments.secrets, "randbelow", random_key)
    asked = router(merged)
    with pytest.raises(VideoError):
        asked.tokenize([{"video": clips[0]}, {"video": "/nowhere.mp4"}, {"text": "Q"}], shm_name_save_path=names)
    with pytest.raises(BackendError, match="cannot be written"):
        asked.tokenize([{"video": clips[0]}], shm_name_save_path=names.parent / "no" / "file")
    monkeypatch.setattr(segments.os, "posix_fallocate", full)
    with pytest.raises(BackendError, match="--shm-size"):
        asked.tokenize([{"video": clips[0]}], shm_name_save_path=names)

    def second_fails(video: Any, file: Any) -> Segment:
        monkeypatch.setattr(segments.os, "posix_fallocate", full if names.exists() else reserve)
        return written(video, file)

    monkeypatch.setattr("atb_pllava.mindie.prompt_builder.write_segment", second_fails)
    with pytest.raises(BackendError):
        asked.tokenize([{"video": clips[0]}, {"video": clips[1]}], shm_name_save_path=names)
    assert names.exists() and len(made) == 4
    assert not any((segments.SHARED_MEMORY / Segment(1 + key, 0).name).exists() for key in made)


def test_blocks() -> None:
    ours = [Segment(1, 40), Segment(2**60 - 1, 2**31)]
    ids = insert_blocks([1, IMAGE_ID, 5, IMAGE_ID], ours, IMAGE_ID, 6)
    assert len(ids) == 14 and ids.count(IMAGE_ID) == 4 and min(ids) >= -(2**63)
    cut = np.array(ids, np.int64).astype(np.int32)  # as the host's sampler sees a prompt
    assert [i for i, token in enumerate(cut) if token > 2**24] == [2, 3, 9, 10] and cut.min() == 0
    assert [(span.start, segment) for span, segment in find_blocks(ids, IMAGE_ID, 6)] == [(1, ours[0]), (8, ours[1])]
    assert find_blocks([IMAGE_ID, 3, IMAGE_ID, IMAGE_ID], IMAGE_ID, 6) == []  # words
    others = ([-1, *ids], ids[:3] + [7] + ids[4:], [IMAGE_ID, -1, ids[3], 0, 0, IMAGE_ID])
    for wrong in (ids[:-1], ids[2:], ids[:8] + ids[9:], ids[:5] + ids[8:], *others):
        with pytest.raises(RequestError, match="not part of a whole video"):
            find_blocks(wrong, IMAGE_ID, 6)
    with pytest.raises(ConfigError, match="at least 4"):
        router_config = config_from_json({**raw_config(), "pooling_shape": [1, 1, 3]})
        PromptBuilder(router_config, None, None, None)  # type: ignore[arg-type]


# The model


def test_service_equals_the_native_engine(
    merged: Path, native: LLM, served: Served, clips: list[str], names: Path
) -> None:
    """A warm-up of text, then a batch: a video, text with an <image> of the user's own, three media."""
    served.generate([[1] * 64] * 3, [[1, 1]] * 3)
    questions = ["What happens?", "Is <image> here?", "Compare."]
    media = [clips[:1], [], clips]
    asked = router(merged)
    parts = [[*({"video": file} for file in media[i]), {"text": questions[i]}] for i in range(3)]
    prompts = [asked.tokenize(part, shm_name_save_path=str(names)).tolist() for part in parts]
    requests = [{"question": questions[i], **({"video": media[i]} if media[i] else {})} for i in range(3)]
    compare(served, prompts, [expected(native, request) for request in requests])


def test_runner_equals_the_native_engine(native: LLM, served: Served, clips: list[str]) -> None:
    """Literal prompts and questions, one path and a list of paths. The caller's embeddings are not changed."""
    literal = "USER: <image>\nWhat? <image> ASSISTANT:"
    asked: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"text": literal, "video": clips[:2]}, {"prompt": literal, "video": clips[:2]}),
        ({"text": "What?", "image": clips[2]}, {"question": "What?", "video": clips[2]}),
        (
            {"text": "USER: <video>\n? ASSISTANT:", "video": clips[0]},
            {"prompt": "USER: <image>\n? ASSISTANT:", "video": clips[0]},
        ),
        ({"text": None, "video": clips[0]}, {"question": "Describe this video.", "video": clips[0]}),
        ({"text": "Hello"}, {"question": "Hello"}),
    ]
    for params, request in asked:
        given = SimpleNamespace(**{"text": None, "image": None, "video": None, "audio": None, **params})
        embeddings = served.model.prepare_prefill_token(given, None)
        before = embeddings.clone()
        compare(served, [embeddings], [expected(native, request)])
        assert torch.equal(embeddings, before)
    with pytest.raises(RequestError, match="exactly once"):
        served.model.prepare_prefill_token(SimpleNamespace(text=literal, video=clips[0], image=None), None)


def test_runner_may_ask_for_other_frames(merged: Path, served: Served, clips: list[str]) -> None:
    given = SimpleNamespace(text="What?", image=None, video=clips[0], frames=7)
    wanted = expected(LLM(merged, dtype="float32", num_frames=7), {"question": "What?", "video": clips[0]})
    compare(served, [served.model.prepare_prefill_token(given, None)], [wanted])


def test_nothing_of_ours_is_written_into(served: Served, merged: Path, clips: list[str], names: Path) -> None:
    before = {name: tensor.clone() for name, tensor in served.model.state_dict().items()}
    ids = router(merged).tokenize([{"video": clips[0]}, {"text": "Q"}], shm_name_save_path=str(names)).tolist()
    first = served.generate([ids], [[1, 2]])
    second = served.generate([ids], [[1, 2]])
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in served.model.state_dict().items())
    assert any(name.startswith("encoder.") for name in before)


def test_segments_that_are_gone_end_the_request(served: Served, merged: Path, clips: list[str], names: Path) -> None:
    ids = router(merged).tokenize([{"video": clips[0]}, {"text": "Q"}], shm_name_save_path=str(names)).tolist()
    with pytest.raises(RequestError, match="not part of a whole video"):
        served.prefill([ids[:10]])
    (segments.SHARED_MEMORY / names.read_text().strip()).unlink()
    with pytest.raises(RequestError, match="gone"):
        served.prefill([ids])


def test_a_decode_may_come_first(host: Any, merged: Path, native: LLM) -> None:
    served = Served(load(host, merged))
    served.decode([1], [1])
    ids = prompts_of(served.runner).token_ids(parse_content_parts([{"text": "Hello"}]))
    compare(served, [ids], [expected(native, {"question": "Hello"})])


def test_the_plain_inference_mode_is_either_of_the_hosts_two(host: Any, merged: Path) -> None:
    Served(load(host, merged, inference_mode=0)).prefill([[1, 2, 3]])


def test_the_first_forward_encodes_a_video(host: Any, merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MindIE measures free memory after its warm-up, which must include the memory for a video."""
    served = Served(load(host, merged))
    shapes = []
    encode = served.model.encoder.model.encode_frames
    monkeypatch.setattr(
        served.model.encoder.model, "encode_frames", lambda pixels: shapes.append(tuple(pixels.shape)) or encode(pixels)
    )
    served.generate([[1] * 8], [[1, 1, 1]])
    assert shapes == [(4, 3, 56, 56)]


def test_positions_beyond_the_rotary_table_are_refused(served: Served) -> None:
    with pytest.raises(RequestError, match="1024 positions"):
        served.decode([1], [1025])


@pytest.mark.parametrize("symmetric", [True, False])
def test_w8a16_is_the_native_engines(host: Any, source: Path, clips: list[str], names: Path, symmetric: bool) -> None:
    path = convert(source, "pllava_w8a16", symmetric=symmetric, group_size=0)
    ids = router(path).tokenize([{"video": clips[0]}, {"text": "Q"}], shm_name_save_path=str(names)).tolist()
    wanted = expected(LLM(path, dtype="float32"), {"question": "Q", "video": clips[0]})
    compare(Served(load(host, path)), [ids], [wanted])


def test_the_register_of_quirks_is_true() -> None:
    assert [quirk.number for quirk in QUIRKS] == list(range(1, len(QUIRKS) + 1))
    for quirk in QUIRKS:
        assert (PLUGIN.parents[1] / quirk.by).is_file(), quirk.by
    sources = {path: path.read_text() for path in PLUGIN.parents[1].rglob("*.py") if path.name != "quirks.py"}
    for path, text in sources.items():
        for word in text.split("quirk ")[1:]:
            number = int("".join(c for c in word[:2] if c.isdigit()))
            assert 1 <= number <= len(QUIRKS), f"{path.name} names quirk {number}"


def test_every_error_is_ours() -> None:
    assert issubclass(BackendError, PllavaError)

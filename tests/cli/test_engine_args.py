"""Options are fields of dataclasses: one definition for the command line, LLM's keywords and the other ranks."""

from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from atb_pllava import LLM, ConfigError, MediaLimits, RequestError, SamplingParams
from atb_pllava.cli.engine_args import from_cli_args, sampling_params
from atb_pllava.cli.verbs import parse, subcommand_parser
from atb_pllava.config import EngineConfig
from atb_pllava.engine.arguments import OPTION_NAMES, EngineArgs
from atb_pllava.errors import check_number, check_whole_number
from atb_pllava.executor.launcher import ParallelOptions
from atb_pllava.loader.model_options import ModelOptions
from atb_pllava.multimodal.options import MultimodalOptions
from atb_pllava.prompt.options import PromptOptions

OWNERS = (ModelOptions, MultimodalOptions, PromptOptions, EngineConfig, ParallelOptions, SamplingParams)
DECLARED = [field for owner in OWNERS for field in fields(owner) if "option" in field.metadata]


@pytest.mark.parametrize("verb", ["run", "predict"])
def test_every_declared_option_is_one_of_the_command(verb: str) -> None:
    actions = {action.dest: action for action in subcommand_parser(verb)._actions}
    for field in DECLARED:
        action = actions[field.name]
        assert action.required == (field.default is MISSING) and action.help
        assert "{" not in action.help, "the default is filled in"
        assert field.default is MISSING or action.default == field.default
        assert field.metadata["option"].choices is None or action.choices == field.metadata["option"].choices


def test_no_two_options_share_a_name() -> None:
    assert len(set(OPTION_NAMES)) == len(OPTION_NAMES)


def test_a_command_line_without_options_is_the_defaults() -> None:
    arguments = parse(["run", "--model_path", "W"])
    args = from_cli_args(arguments, compiler=None, kernel_dir=None)
    assert args == EngineArgs.from_keywords("W", limits=MediaLimits())
    assert sampling_params(arguments) == SamplingParams()


def test_options_reach_their_fields() -> None:
    words = ["--prefill-chunk", "64", "--vision_batch=2", "--prefix_cache", "off", "--decode_graphs", "on"]
    words += ["--load_format", "dummy", "--pooling_shape", "4-2-2", "--media_limit", "max_side=90", "--seed", "3"]
    arguments = parse(["run", "--model_path", "W", *words])
    args = from_cli_args(arguments, max_batch_size=3)
    engine = args.engine
    assert (engine.prefill_chunk, engine.vision_batch, engine.max_batch_size) == (64, 2, 3)
    assert engine.prefix_cache is False and engine.decode_graphs is True
    assert args.model.load_format == "dummy" and args.model.pooling_shape == (4, 2, 2)
    assert args.multimodal.limits == MediaLimits(max_side=90)
    assert sampling_params(arguments).seed == 3
    assert ModelOptions.from_json(args.model.to_json()) == args.model  # what a rank gets


def test_given_options_are_known(capsys) -> None:
    assert parse(["run", "--model-path", "W", "--num-frames=3"]).given == {"model_path", "num_frames"}
    assert parse(["bench", "--shape", "1b"]).given == {"shape"}  # of the default subcommand, sweep
    for words in (["--prefix_cache", "on", "--prefix-cache", "off"], ["--prefix_cache", "maybe"]):
        with pytest.raises(SystemExit):
            parse(["run", "--model_path", "W", *words])
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("error: --prefix_cache is given twice, on and off; give it once")
    assert said[1].startswith("error: --prefix_cache is 'maybe'; it must be on or off")


def test_an_unknown_keyword_is_refused_by_name() -> None:
    with pytest.raises(
        TypeError, match=r"no option 'max_batch'\. Did you mean max_batch_size\? The options are model_"
    ):
        LLM("anywhere", max_batch=3)
    with pytest.raises(TypeError, match="got an EngineArgs and dtype too"):
        LLM(EngineArgs.from_keywords("anywhere"), dtype="float32")


def test_the_same_objects_or_the_same_keywords(checkpoint: Path) -> None:
    options = {"dtype": "float32", "backend": "cpu", "max_batch_size": 2, "conversation": "demo"}
    args = EngineArgs.from_keywords(checkpoint, **options)
    assert LLM(args).args == LLM(checkpoint, **options).args == args
    assert args.engine.max_batch_size == 2 and args.prompt.conversation == "demo"


@pytest.mark.parametrize("option", [{"lora_alpha": 4.0}, {"weight_dir": "L"}, {"ignore_adapter_config": True}])
def test_dummy_weights_have_no_lora(option: dict) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(option))} has no effect on load_format 'dummy'"):
        ModelOptions("W", load_format="dummy", **option)


@pytest.mark.parametrize("value", [0, 9, 1.0, "3", True, None])
def test_numbers_out_of_range(value: object) -> None:
    with pytest.raises(ConfigError, match=f"size is {value!r}; it must be a whole number from 1 to 8"):
        check_whole_number("size", value, 1, 8)
    with pytest.raises(RequestError, match="it must be a whole number of at least 10 \\(here\\)"):
        check_whole_number("size", value, 10, error=RequestError, note=" (here)")
    if value not in (1.0, True):
        with pytest.raises(RequestError, match="it must be a number from 0.5 to 2.5"):
            check_number("size", value, 0.5, 2.5, RequestError)

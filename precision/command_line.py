"""All that the commands of precision/ take from the package's command line: parsers, option groups, loading, endings.

No other file of precision/ imports from `atb_pllava.cli`.
"""

from atb_pllava.cli import Parser, run_command
from atb_pllava.cli.engine_args import (
    add_engine_options,
    add_model_options,
    add_prompt_options,
    add_sampling_options,
    from_cli_args,
    sampling_params,
)
from atb_pllava.cli.loading import join_torchrun, load_model
from atb_pllava.cli.media_option import add_media
from atb_pllava.cli.predict import add_options as add_predict_options
from atb_pllava.cli.predict import predict
from atb_pllava.cli.question import question
from atb_pllava.cli.resuming import add_overwrite_option, planned_settings
from atb_pllava.prompt.chat_template import DEFAULT_PROMPT

__all__ = [
    "DEFAULT_PROMPT",
    "Parser",
    "add_engine_options",
    "add_media",
    "add_model_options",
    "add_overwrite_option",
    "add_predict_options",
    "add_prompt_options",
    "add_sampling_options",
    "from_cli_args",
    "join_torchrun",
    "load_model",
    "planned_settings",
    "predict",
    "question",
    "run_command",
    "sampling_params",
]

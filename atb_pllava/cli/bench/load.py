"""`bench load`: time and memory that loading a checkpoint from the page cache takes."""

import argparse
from typing import Any

from atb_pllava.bench.microbench import loading_time
from atb_pllava.cli.bench.output import add_json, check_json, print_rows
from atb_pllava.cli.engine_args import add_model_options
from atb_pllava.cli.loading import load_model
from atb_pllava.errors import ConfigError

# The engine gets the least memory beside the weights.
_SMALLEST: dict[str, Any] = {
    "max_batch_size": 1,
    "max_input_length": 1,
    "max_output_length": 1,
    "video_cache_bytes": 0,
    "prefix_cache": False,
}

# The headings of the table, which is at most 100 characters wide.
_COLUMNS = {
    "files_GB": "files GB",
    "page_cache_GB_per_s": "page cache GB/s",
    "load_s": "load s",
    "load_GB_per_s": "load GB/s",
    "weights_GB": "weights GB",
    "peak_memory_GB": "peak GB",
    "memory_before_GB": "before GB",
    "device_memory_GB": "device GB",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    parser.add_argument("--quiet", action="store_true", help="only warnings and errors on stderr")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the time and the peak memory of loading a checkpoint from the page cache."""
    check_json(arguments)
    if arguments.world_size not in (None, 1):
        raise ConfigError("bench load measures one process: leave --world_size out")
    row = loading_time(arguments.model_path, lambda: load_model(arguments, **_SMALLEST))
    print_rows(arguments, [row], {key: heading for key, heading in _COLUMNS.items() if key in row})
    return 0

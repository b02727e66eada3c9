"""`python -m atb_pllava gallery`: a page in the browser over captions, predictions and evaluations."""

import argparse
import glob
import logging
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack, closing

from atb_pllava.cli.extras import import_with_extra
from atb_pllava.cli.help import HelpFormatter
from atb_pllava.errors import ConfigError, counted

EXAMPLES = """examples:
  python -m atb_pllava gallery captions.jsonl
  python -m atb_pllava gallery a/predict_result.json b/predict_result.json
  python -m atb_pllava gallery results_npu results_gpu --port 9000"""

# The result files of precision.evaluate, the one that says most first. A judge's name is behind the dash.
_FILES_OF_EVALUATE = ("all_results.json", "final_results-*.json", "inference_results.json", "answers.jsonl")
_OPEN_TO_ALL = "warning: whoever reaches this address sees the results and their videos"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `gallery`."""
    parser.formatter_class = HelpFormatter
    parser.usage = "%(prog)s RESULTS... [OPTION ...]"
    parser.epilog = EXAMPLES
    parser.add_argument(
        "results",
        nargs="+",
        metavar="RESULTS",
        help="captions.jsonl and other logs, predict_result.json, --output_json files, folders of precision.evaluate",
    )
    parser.add_argument("--port", type=int, default=8080, metavar="N", help="default 8080; 0: any free one")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="default 127.0.0.1: this machine only")


def gallery(arguments: argparse.Namespace) -> int:
    """Read the results and serve the page until a signal comes."""
    page = import_with_extra("atb_pllava.ui.gallery_page", "ui")
    # The packages of the extra [ui] are imported here, after `import_with_extra` has looked for them.
    from atb_pllava.server.listening import HttpServer, is_loopback, open_socket, url_of
    from atb_pllava.ui.result_set import ResultSet

    if not 0 <= arguments.port < 65536:
        raise ConfigError(f"--port is {arguments.port}; it must be a port number from 0 to 65535")
    with ExitStack() as stack:
        listener = stack.enter_context(open_socket(arguments.host, arguments.port))
        results = stack.enter_context(closing(ResultSet(_files(arguments.results))))
        with HttpServer(page.create_gallery(results), listener):
            if not is_loopback(listener):
                print(_OPEN_TO_ALL, file=sys.stderr)
            try:
                where = f"at {url_of(listener)} (Ctrl-C ends)"
                print(f"{counted(len(results), 'row')} {where}", file=sys.stderr, flush=True)
                threading.Event().wait()
            except KeyboardInterrupt:  # SIGTERM too
                # uvicorn logs a traceback for the stream of every page that is still open.
                logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
                return 0
    raise AssertionError("only a signal ends the wait")


def _files(paths: Sequence[str]) -> list[str]:
    """The named files. In place of a folder, its result file. Raises ConfigError for a folder without or with two."""
    found = []
    for path in paths:
        if not os.path.isdir(path):
            found.append(path)
            continue
        for pattern in _FILES_OF_EVALUATE:
            files = sorted(glob.glob(os.path.join(glob.escape(path), pattern)))
            if len(files) > 1:
                raise ConfigError(f"{path} has the results of several judges, {', '.join(files)}: name one")
            if files:
                found += files
                break
        else:
            raise ConfigError(f"{path} has none of {', '.join(_FILES_OF_EVALUATE)}; name a file of results")
    return found

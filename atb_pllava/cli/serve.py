"""`python -m atb_pllava serve`: an HTTP server that speaks OpenAI's API."""

import argparse
import logging
import os
import secrets
import sys
from contextlib import ExitStack, closing
from pathlib import Path

from atb_pllava.batch.run_metadata import model_settings
from atb_pllava.cli.engine_args import (
    add_cli_args,
    add_engine_options,
    add_model_options,
    add_prompt_options,
)
from atb_pllava.cli.environment import api_key
from atb_pllava.cli.extras import import_with_extra
from atb_pllava.cli.loading import join_torchrun, load_model
from atb_pllava.cli.media_limit_option import media_limits
from atb_pllava.cli.tiny_model import tiny_model
from atb_pllava.distributed.rendezvous import Rendezvous
from atb_pllava.errors import ConfigError
from atb_pllava.server.options import ServerOptions

EXAMPLES = """examples:
  python -m atb_pllava serve
  python -m atb_pllava serve --model_path MODELS/pllava-7b --port 9000
  python -m atb_pllava serve --model_path MODELS/pllava-7b \\
      --api_key_file keys.txt --allowed_media_domains videos.example.org"""

_OPEN_TO_ALL = "warning: whoever reaches this address may use the server; set --api_key_file"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `serve`."""
    parser.usage = "%(prog)s [--model_path DIR] [--port N] [OPTION ...]"
    parser.epilog = EXAMPLES
    group = parser.add_argument_group("server")
    add_cli_args(group, ServerOptions)
    group.add_argument("--ui", action="store_true", help="also a chat page for the browser, under /ui")
    add_model_options(parser, required=False)
    add_prompt_options(parser)
    add_engine_options(parser)


def serve(arguments: argparse.Namespace) -> int:
    """Load a model and answer HTTP requests until a signal comes. Returns 1 when the engine has failed."""
    import_with_extra("atb_pllava.server.app", "serve")
    options = ServerOptions(**{name: getattr(arguments, name) for name in ServerOptions.__dataclass_fields__})
    if arguments.model_path is None:
        arguments.model_path = tiny_model()
    arguments.quiet = options.log_level in ("warning", "error")
    if not arguments.verbose:
        logging.getLogger("atb_pllava").setLevel(options.log_level.upper())
    workers = join_torchrun(arguments)
    if isinstance(workers, int):
        return workers
    return _serve(arguments, options, workers)


def _serve(arguments: argparse.Namespace, options: ServerOptions, workers: Rendezvous | None) -> int:
    """Open the port, load the model and serve. A port in use ends the command before the model is loaded."""
    # The packages of the extra [serve] are imported here, after `serve` has looked for them.
    from atb_pllava.server.access_log import write_access_log
    from atb_pllava.server.app import create_app
    from atb_pllava.server.auth import parse_api_keys
    from atb_pllava.server.listening import HttpServer, is_loopback, open_socket, url_of
    from atb_pllava.server.run_server import serve_until_end
    from atb_pllava.server.state import ServerState

    page = import_with_extra("atb_pllava.cli.serve_page", "ui") if arguments.ui else None
    name = options.served_model_name or os.path.basename(os.path.abspath(arguments.model_path))
    text = _api_key_text(options.api_key_file)
    page_key = secrets.token_urlsafe(32)  # the page is a client of the server as any other
    keys = None if text is None else parse_api_keys(text)
    if keys is not None and page is not None:
        keys = parse_api_keys(f"{text}\n{page_key}")
    state = ServerState(name, options, keys, media_limits(arguments.media_limit))
    if not arguments.quiet:
        write_access_log(sys.stdout)
    with closing(state), open_socket(options.host, options.port) as listener, ExitStack() as stack:
        app = create_app(state, None if page is None else page.PAGE_PATH)
        if page is not None:
            stack.enter_context(page.own_upload_folder())
            page.add_page(app, state, url_of(listener), page_key)
        stack.enter_context(HttpServer(app, listener))
        llm = stack.enter_context(load_model(arguments, workers, media_worker_at_load=True))
        state.serve(llm.engine, model_settings(llm))
        url = url_of(listener, options.root_path)
        print(_welcome(url, name, text is not None), file=sys.stderr)
        if page is not None:
            print(f"the page: {url}{page.PAGE_PATH}/", file=sys.stderr)
        if text is None and not is_loopback(listener):
            print(_OPEN_TO_ALL, file=sys.stderr)
        return serve_until_end(state)


def _api_key_text(path: str | None) -> str | None:
    """The text that has the API keys, one a line: of a file, or of the environment. None without keys."""
    key = api_key()
    if path is None:
        return key
    if key is not None:
        raise ConfigError("--api_key_file and ATB_PLLAVA_API_KEY are both given; leave one of them out")
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"--api_key_file {path} cannot be read: {reason}") from None


def _welcome(url: str, name: str, has_keys: bool) -> str:
    """Where the server is, and a line to try."""
    body = '{"messages": [{"role": "user", "content": "What can you see?"}]}'
    key = " -H 'Authorization: Bearer KEY'" if has_keys else ""
    return (
        f"serving {name} at {url} (Ctrl-C ends)\n"
        f"try: curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'"
    )

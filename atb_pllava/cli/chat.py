"""`python -m atb_pllava chat`: load once, ask many questions about a video, in a terminal."""

import argparse
import sys
from contextlib import ExitStack

from atb_pllava.cli.chat_answerer import Answerer, LocalAnswerer
from atb_pllava.cli.chat_session import COMMANDS, ChatSession
from atb_pllava.cli.engine_args import (
    add_engine_options,
    add_model_options,
    add_prompt_options,
    add_sampling_options,
    sampling_params,
)
from atb_pllava.cli.loading import join_torchrun, load_model
from atb_pllava.cli.media_option import check_paths
from atb_pllava.cli.server_option import add_server_option, open_client
from atb_pllava.cli.tiny_model import tiny_model
from atb_pllava.multimodal.media import list_media

EXAMPLES = """examples:
  python -m atb_pllava chat examples/videos/red_circle_moves_left.mp4
  python -m atb_pllava chat a.mp4 --model_path MODELS/pllava-7b
  python -m atb_pllava chat a.mp4 --server http://127.0.0.1:8000"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `chat`."""
    parser.usage = "%(prog)s [VIDEO ...] [--model_path DIR] [OPTION ...]"
    commands = "\n".join(f"  {name:12}{words}" for name, words in COMMANDS.items())
    parser.epilog = f"in the chat:\n{commands}\n\n{EXAMPLES}"
    parser.add_argument("media", nargs="*", metavar="VIDEO", help="videos and images to ask about (default: text only)")
    add_server_option(parser)
    parser.add_argument("--quiet", action="store_true", help="only answers, warnings and errors")
    add_model_options(parser, required=False)
    add_sampling_options(parser)
    add_prompt_options(parser)
    add_engine_options(parser)


def chat(arguments: argparse.Namespace) -> int:
    """Ask the lines of stdin and print the answers while they grow."""
    params = sampling_params(arguments)
    params.check_streamed()
    with ExitStack() as stack:
        answerer: Answerer
        if arguments.server is not None:
            answerer = _server_answerer(arguments, stack)
        else:
            arguments.model_path = arguments.model_path or tiny_model()
            workers = join_torchrun(arguments)
            if isinstance(workers, int):
                return workers
            check_paths(arguments)
            media = list_media(*arguments.media) if arguments.media else []
            llm = stack.enter_context(load_model(arguments, workers, media_worker_at_load=bool(media)))
            answerer = LocalAnswerer(llm, params)
        return ChatSession(answerer, quiet=arguments.quiet).run(arguments.media)


def _server_answerer(arguments: argparse.Namespace, stack: ExitStack) -> Answerer:
    """The Answerer of --server. Options that a running server has decided are refused by name."""
    sampling = {name for name in vars(sampling_params(arguments)) if name in arguments.given}
    client = stack.enter_context(open_client(arguments, {"media", "system", "max_output_length", *sampling}))
    from atb_pllava.cli.server_answerer import ServerAnswerer  # its packages are an extra

    fields = {name: getattr(arguments, name) for name in sorted(sampling)}
    if arguments.max_output_length is not None:
        fields["max_tokens"] = arguments.max_output_length
    answerer = stack.enter_context(ServerAnswerer(client, fields, arguments.system))
    if not arguments.quiet:
        print(f"asking {answerer.model} at {client.url}", file=sys.stderr)
    return answerer

"""The option --server: a command asks a running server instead of loading a model."""

import argparse
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from atb_pllava.cli.environment import api_key
from atb_pllava.cli.extras import import_with_extra
from atb_pllava.errors import ConfigError

if TYPE_CHECKING:
    from atb_pllava.client.api_client import ApiClient


def add_server_option(group: Any) -> None:
    """Add --server."""
    group.add_argument(
        "--server", metavar="URL", help="ask a running server instead of loading a model (key: ATB_PLLAVA_API_KEY)"
    )


def open_client(arguments: argparse.Namespace, allowed: Collection[str]) -> "ApiClient":
    """A client of the server that --server names.

    Raises ConfigError for options outside `allowed`, which the running server has decided. Raises ServerError for a
    URL of no server.
    """
    decided = sorted(arguments.given - {"server", "quiet", "verbose"} - set(allowed))
    if decided:
        raise ConfigError(f"--server asks a model that is loaded already: leave out --{' and --'.join(decided)}")
    client: ApiClient = import_with_extra("atb_pllava.client.api_client", "serve").ApiClient(
        arguments.server, api_key()
    )
    return client

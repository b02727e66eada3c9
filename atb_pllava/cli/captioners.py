"""Makes the Captioner of a `caption` command: a model in this process, replicas, or running servers."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from atb_pllava.batch.captioner import Captioner, LocalCaptioner
from atb_pllava.batch.run_metadata import model_settings
from atb_pllava.cli.caption_job import CaptionJob, check_server_has_preset
from atb_pllava.cli.environment import api_key
from atb_pllava.cli.extras import import_with_extra
from atb_pllava.cli.loading import load_model
from atb_pllava.cli.media_limit_option import media_limits
from atb_pllava.cli.waiting import time_table
from atb_pllava.config import EngineConfig
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.llm import LLM
from atb_pllava.multimodal.media_pool import default_workers

if TYPE_CHECKING:
    from atb_pllava.batch.url_media import UrlMedia


@contextmanager
def captioner_of(job: CaptionJob) -> Iterator[tuple[Captioner, Mapping[str, Any], Callable[[float], str]]]:
    """What answers, the settings of its model, and a function that says where the seconds of a run went."""
    with ExitStack() as stack:
        if job.arguments.server:
            captioner, settings = _asking(job.arguments.server, api_key(), job.params, stack)
            if job.arguments.preset is not None:
                check_server_has_preset(job.arguments.preset, settings)
            yield captioner, settings, lambda seconds: ""
        elif job.arguments.replicas:
            import_with_extra("atb_pllava.server.app", "serve")
            replicas_module = import_with_extra("atb_pllava.cli.replicas", "serve")
            replicas = stack.enter_context(replicas_module.Replicas(job.arguments.replicas, job.arguments))
            batch = job.arguments.max_batch_size
            yield *_asking(replicas.urls, replicas.api_key, job.params, stack, batch), lambda seconds: ""
        else:
            urls = _url_media(job.arguments)
            llm = stack.enter_context(load_model(job.arguments, job.workers, media_worker_at_load=True))
            captioner = LocalCaptioner(llm, job.params, urls)
            yield captioner, model_settings(llm), _time_table_of(llm, job.arguments)


def _asking(
    urls: Sequence[str],
    key: str | None,
    params: SamplingParams,
    stack: ExitStack,
    batch: int = EngineConfig.max_batch_size,
) -> tuple[Captioner, Mapping[str, Any]]:
    """A captioner that asks servers, and the settings of their models. `batch`: requests that each runs at a time."""
    api_client = import_with_extra("atb_pllava.client.api_client", "serve")
    from atb_pllava.batch.server_captioner import ServerCaptioner  # its packages are an extra

    clients = [stack.enter_context(api_client.ApiClient(url, key)) for url in urls]
    captioner = stack.enter_context(ServerCaptioner(clients, params, 2 * batch))
    return captioner, captioner.settings


def _url_media(arguments: argparse.Namespace) -> "UrlMedia | None":
    """What fetches URLs. None when no host is allowed."""
    domains = arguments.allowed_media_domains
    if domains is None:
        return None
    urls: UrlMedia = import_with_extra("atb_pllava.batch.url_media", "serve").UrlMedia(
        domains, media_limits(arguments.media_limit)
    )
    return urls


def _time_table_of(llm: LLM, arguments: argparse.Namespace) -> Callable[[float], str]:
    """A function of a run's seconds that says where they went, from now on."""
    before = llm.engine.stats()
    media_workers = default_workers() if arguments.media_workers is None else int(arguments.media_workers)
    return lambda seconds: time_table(before, llm.engine.stats(), seconds, media_workers)

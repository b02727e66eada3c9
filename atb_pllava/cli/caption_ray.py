"""`caption --ray`: the actors of a Ray cluster answer, and this process writes their rows."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from atb_pllava.batch.captioning import CaptionCounts
from atb_pllava.batch.progress import Progress
from atb_pllava.batch.ray_actor import ActorModel
from atb_pllava.batch.result_log import ResultLog
from atb_pllava.batch.tables import Table
from atb_pllava.cli.caption_job import CaptionJob
from atb_pllava.cli.engine_args import from_cli_args
from atb_pllava.cli.extras import import_with_extra
from atb_pllava.cli.media_limit_option import media_limits

EXTRA = "ray"


@contextmanager
def ray_cluster(address: str | None) -> Iterator[Callable[[str], Table] | None]:
    """Connect to the cluster of --ray, and yield what opens a table on object storage. None without --ray."""
    if address is None:
        yield None
        return
    with import_with_extra("atb_pllava.batch.ray_cluster", EXTRA).connected(address):
        yield import_with_extra("atb_pllava.batch.ray_table", EXTRA).RayTable


def caption_on_ray(
    job: CaptionJob, log: ResultLog, planned: Mapping[str, Any] | None, progress: Progress
) -> CaptionCounts:
    """Answer all questions of a job on the cluster to which this process is connected. See `RayCaptionRun`."""
    arguments = job.arguments
    if arguments.allowed_media_domains is not None:
        import_with_extra("atb_pllava.batch.url_media", "serve")  # the actors need it, too
    cluster = import_with_extra("atb_pllava.batch.ray_cluster", EXTRA)
    runs = import_with_extra("atb_pllava.batch.ray_caption", EXTRA)
    args = from_cli_args(arguments, media_worker_at_load=True, master_port=None)  # each actor takes a free port
    pool = cluster.actor_pool(arguments.replicas, args.parallel.world_size or 1, args.model.backend)
    if args.multimodal.media_workers is None:
        args = replace(args, multimodal=replace(args.multimodal, media_workers=pool.media_workers))
    model = ActorModel(
        args,
        job.params,
        job.prompts,
        os.getcwd(),
        arguments.allowed_media_domains,
        media_limits(arguments.media_limit),
    )
    run = runs.RayCaptionRun(model, pool, job.asked, log, progress, planned, arguments.retry_errors)
    counts: CaptionCounts = run.run(job.videos.items())
    return counts

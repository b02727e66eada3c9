"""build_engine: loads the model on all ranks and makes an AsyncEngine of the options."""

from atb_pllava.config import PllavaConfig
from atb_pllava.distributed.rendezvous import Rendezvous
from atb_pllava.engine.arguments import EngineArgs
from atb_pllava.engine.async_engine import AsyncEngine
from atb_pllava.engine.core import EngineCore
from atb_pllava.engine.kv_cache_plan import kv_cache_blocks
from atb_pllava.engine.request_parser import RequestParser
from atb_pllava.executor.launcher import Launcher
from atb_pllava.loader.checkpoint_config import read_preprocessor_config
from atb_pllava.multimodal.frame_cache import FrameCache
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.multimodal.media_pool import MediaPool
from atb_pllava.multimodal.processor import VideoProcessor
from atb_pllava.ops.interface import Feature
from atb_pllava.prompt.tokenizer import Tokenizer


def build_engine(args: EngineArgs, rendezvous: Rendezvous | None = None) -> tuple[AsyncEngine, Launcher]:
    """Load the model, and start the other ranks unless `rendezvous` is the link to ranks that torchrun started.

    Returns the engine, and the launcher that holds the model. Closing the engine closes the launcher.
    Raises ConfigError, WeightError or BackendError for options and checkpoints that cannot work.
    """
    config = args.model.config()
    tokenizer = Tokenizer.from_dir(args.model.model_path, config.image_token_index)
    conversation = args.prompt.choose(tokenizer.is_chatml)
    workers = args.multimodal.media_workers
    pool = None if workers == 0 else MediaPool(workers)
    if pool is not None and args.multimodal.media_worker_at_load:
        pool.start_worker()
    processor = _make_processor(args, config, pool)
    parser = RequestParser(config, tokenizer, conversation, processor, args.engine.max_output_length)
    launcher = Launcher(args.model, args.parallel, rendezvous)
    if args.engine.kv_cache_dtype == "int8":
        launcher.model.ops.require(Feature.INT8_KV_CACHE)
    executor = launcher.launch(
        args.engine, processor.preprocessor, lambda model, free: kv_cache_blocks(model, args.engine, free)
    )
    core = EngineCore(executor, args.engine)
    readers = 1 if pool is None else pool.size
    on_close = [launcher.close] if pool is None else [pool.close, launcher.close]
    return AsyncEngine(core, parser, readers, on_close), launcher


def _make_processor(args: EngineArgs, config: PllavaConfig, pool: MediaPool | None) -> VideoProcessor:
    """The processor of media for this checkpoint, with a frame cache of as many bytes as the encoder cache."""
    choices = args.multimodal
    cache_bytes = args.engine.video_cache_bytes
    return VideoProcessor(
        config.num_frames,
        read_preprocessor_config(args.model.model_path, config.vision.image_size),
        choices.frame_sampler,
        choices.resize,
        choices.limits or MediaLimits(),
        FrameCache(cache_bytes) if cache_bytes else None,
        pool,
    )

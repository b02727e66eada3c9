"""Options that every command with a model has, and the model, limits and sampling that they describe."""

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from atb_pllava.cli.environment import compiler, kernel_dir, master_port, started_by_torchrun
from atb_pllava.config import DTYPES, KV_CACHE_DTYPES, EngineConfig
from atb_pllava.distributed.rendezvous import Rendezvous
from atb_pllava.engine.sampling_params import SamplingParams
from atb_pllava.errors import ConfigError, counted
from atb_pllava.executor.worker import run_worker
from atb_pllava.llm import LLM
from atb_pllava.loader.model_loader import ModelOptions
from atb_pllava.multimodal.frame_sampling import FRAME_SAMPLERS
from atb_pllava.multimodal.limits import MediaLimits
from atb_pllava.multimodal.transforms import RESIZE_MODES
from atb_pllava.ops import BACKENDS, KERNELS
from atb_pllava.prompt.chat_template import CONVERSATIONS

# What each prompt format is; the epilog of --help lists them.
CONVERSATION_WORDS = {
    "plain": "USER: and ASSISTANT:, no system text (default)",
    "demo": "PLLaVA's demo: system text, video in its own turn",
    "npu": "PLLaVA-NPU's script: demo, the question first",
    "eval_vcgbench": "PLLaVA's script for VCGBench: long answers",
    "eval_mvbench": "PLLaVA's script for MVBench: multiple choice",
    "eval_recaption": "PLLaVA's script for captions",
    "eval_videoqabench": "PLLaVA's script for MSVD and others: short answers",
    "eval_vcg_llavanext": "eval_vcgbench for 34B (default there)",
    "eval_mvbench_llavanext": "eval_mvbench for 34B",
    "eval_recaption_llavanext": "eval_recaption for 34B",
    "eval_videoqa_llavanext": "eval_videoqabench for 34B",
}


class HelpFormatter(argparse.HelpFormatter):
    """Option names and their help on one line where 80 columns allow it; a usage line with what is required only.

    Paragraphs of the description and the epilog are wrapped, unless they have lines of their own.
    """

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def add_usage(
        self,
        usage: str | None,
        actions: Iterable[argparse.Action],
        groups: Iterable[Any],
        prefix: str | None = None,
    ) -> None:
        if usage is None:
            wanted = [f"{a.option_strings[0]} {a.metavar}" for a in actions if a.required and a.option_strings]
            usage = " ".join(["%(prog)s", *wanted, "[OPTION ...]"])
            if len(f"usage: {usage % {'prog': self._prog}}") > self._width:
                usage = usage.replace("%(prog)s ", "%(prog)s\n           ")
        super().add_usage(usage, actions, groups, prefix)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.split("\n\n")
        return "\n\n".join(
            p if "\n" in p else super(HelpFormatter, self)._fill_text(p, width, indent) for p in paragraphs
        )


def add_model_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Which model, and where it runs; `required`: whether there must be a checkpoint."""
    parser.formatter_class = HelpFormatter
    parser.set_defaults(load_format="safetensors", compiler=compiler(), kernel_dir=kernel_dir())
    parser.add_argument("-v", "--verbose", action="store_true", help="say on stderr what is found, chosen and loaded")
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model_path", required=required, metavar="DIR", help="checkpoint directory, in any published layout"
    )
    group.add_argument("--weight_dir", metavar="DIR", help="training output (LoRA, projector) on top of it")
    group.add_argument(
        "--lora_alpha",
        type=float,
        metavar="A",
        help="LoRA strength, scale = A / rank (default: what adapter_config.json beside the LoRA says, else 4)",
    )
    group.add_argument(
        "--ignore_adapter_config",
        action="store_true",
        help="scale the LoRA by --lora_alpha / rank, or 4 / rank, whatever its adapter_config.json says",
    )
    group.add_argument(
        "--num_frames", type=int, metavar="T", help="frames of each video (default: the checkpoint's, 16)"
    )
    group.add_argument(
        "--pooling_shape",
        metavar="T-H-W",
        help="video tokens: frames-rows-columns (default: the checkpoint's, 16-12-12)",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        metavar="NAME",
        help="float32, bfloat16, float16 or auto (default): as stored; on a CPU bfloat16 where native, else float32",
    )
    group.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        metavar="NAME",
        help="cpu, cuda, ascend or auto (default): NPU, GPU, else CPU",
    )
    group.add_argument(
        "--kernels",
        choices=KERNELS,
        default="auto",
        metavar="NAME",
        help="native (compiled with $CXX; Triton on CUDA), torch (none, slow) or auto (default): native if it works",
    )
    group.add_argument("--world_size", type=int, metavar="N", help="devices to split the model over (default 1)")
    group.add_argument(
        "--trust_remote_code", action="store_true", help="accepted, no effect: no code in a checkpoint is run"
    )


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """How media become frames, and questions prompts."""
    group = parser.add_argument_group("frames and prompts")
    group.add_argument(
        "--frame_sampler",
        choices=FRAME_SAMPLERS,
        default="demo",
        metavar="NAME",
        help="which frames: demo (default), the middle of each of T equal parts of the video; eval, the same between a "
        "question's start and end; npu, the beginning of each part",
    )
    group.add_argument(
        "--resize",
        choices=RESIZE_MODES,
        default="clip",
        metavar="NAME",
        help="frames to squares: clip (default), scale the short side and crop; res672, first scale it to 672; squash, "
        "stretch",
    )
    group.add_argument("--conversation", choices=tuple(CONVERSATIONS), metavar="NAME", help="prompt format, see below")
    group.add_argument("--system", metavar="TEXT", help="system text instead of the conversation's own")
    group.add_argument(
        "--video_caption", action="store_true", help="PLLaVA-NPU's captioning: its turns and a system text"
    )
    limits = ", ".join(f"{name}={value}" for name, value in vars(MediaLimits()).items())
    group.add_argument(
        "--media_limit", action="append", default=[], metavar="NAME=N", help=f"change a limit, repeatable: {limits}"
    )
    words = "\n".join(f"  {name:26}{words}" for name, words in CONVERSATION_WORDS.items())
    own = f"\n\n{parser.epilog}" if parser.epilog else ""
    parser.epilog = f"conversations:\n{words}{own}"


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """How many requests at a time, how long, and the memory for them."""
    group = parser.add_argument_group("engine")
    group.add_argument("--max_batch_size", type=int, default=8, metavar="N", help="requests at a time (default 8)")
    group.add_argument(
        "--max_input_length",
        type=int,
        metavar="N",
        help="longest prompt in tokens, video included (default: what the KV cache holds)",
    )
    group.add_argument(
        "--max_output_length",
        type=int,
        metavar="N",
        help=f"most tokens of an answer (default {SamplingParams.max_tokens})",
    )
    group.add_argument("--block_size", type=int, default=128, metavar="N", help="tokens in a KV block (default 128)")
    group.add_argument(
        "--kv_cache_bytes",
        type=int,
        metavar="N",
        help="memory for the KV cache (default: a full batch's, at most half of what is free)",
    )
    group.add_argument(
        "--kv_cache_dtype",
        choices=KV_CACHE_DTYPES,
        default="auto",
        metavar="NAME",
        help="int8: keys and values in half the memory, slightly other numbers, CPU only; auto (default): as --dtype",
    )
    group.add_argument(
        "--video_cache_bytes",
        type=int,
        default=EngineConfig.video_cache_bytes,
        metavar="N",
        help="memory for videos seen before: their tokens, and as much for their frames (default 1 GiB; 0: none)",
    )
    group.add_argument(
        "--prefix_cache",
        choices=("on", "off"),
        default="on",
        metavar="on|off",
        help="share keys and values of prompts that begin alike, video included (default on)",
    )
    group.add_argument(
        "--decode_graphs",
        choices=("on", "off"),
        default="on",
        metavar="on|off",
        help="launch a decode step as one graph where the device can (default on)",
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How the next token is chosen."""
    defaults = SamplingParams()
    group = parser.add_argument_group("generation")
    group.add_argument(
        "--temperature", type=float, default=defaults.temperature, metavar="X", help="0 (default): the likeliest token"
    )
    group.add_argument(
        "--top_p", type=float, default=defaults.top_p, metavar="X", help="sample from the likeliest up to this sum"
    )
    group.add_argument(
        "--top_k", type=int, default=defaults.top_k, metavar="K", help="sample from the K likeliest (0: all)"
    )
    group.add_argument(
        "--repetition_penalty",
        type=float,
        default=defaults.repetition_penalty,
        metavar="X",
        help="above 1: fewer repetitions (default 1: off)",
    )
    group.add_argument("--seed", type=int, metavar="N", help="makes sampled answers repeatable")
    group.add_argument("--ignore_eos", action="store_true", help="always generate --max_output_length tokens")


def model_options(arguments: argparse.Namespace) -> ModelOptions:
    """What every rank has to know."""
    return ModelOptions(**{name: getattr(arguments, name) for name in ModelOptions.__dataclass_fields__})


def join_torchrun(arguments: argparse.Namespace) -> Rendezvous | int | None:
    """The link to the ranks torchrun started, None without it; on all but rank 0 the exit status, after their work."""
    if not started_by_torchrun(arguments.world_size):
        return None
    workers = Rendezvous.among_torchrun()
    return workers if workers.parallel.rank == 0 else run_worker(workers, model_options(arguments))


def load_model(arguments: argparse.Namespace, workers: Rendezvous | None = None) -> LLM:
    """The model that the options describe; says on stderr when it is ready, and what --trust_remote_code does."""
    if arguments.trust_remote_code:
        print("--trust_remote_code: no code from a checkpoint is ever executed, with or without it", file=sys.stderr)
    began = time.perf_counter()
    llm = LLM(
        arguments.model_path,
        weight_dir=arguments.weight_dir,
        lora_alpha=arguments.lora_alpha,
        ignore_adapter_config=arguments.ignore_adapter_config,
        num_frames=arguments.num_frames,
        pooling_shape=arguments.pooling_shape,
        dtype=arguments.dtype,
        backend=arguments.backend,
        frame_sampler=arguments.frame_sampler,
        resize=arguments.resize,
        conversation=arguments.conversation,
        system=arguments.system,
        video_caption=arguments.video_caption,
        limits=_limits(arguments.media_limit),
        load_format=arguments.load_format,
        kernels=arguments.kernels,
        compiler=arguments.compiler,
        kernel_dir=arguments.kernel_dir,
        block_size=arguments.block_size,
        max_batch_size=arguments.max_batch_size,
        max_input_length=arguments.max_input_length,
        max_output_length=arguments.max_output_length,
        kv_cache_bytes=arguments.kv_cache_bytes,
        kv_cache_dtype=arguments.kv_cache_dtype,
        video_cache_bytes=arguments.video_cache_bytes,
        prefix_cache=arguments.prefix_cache == "on",
        decode_graphs=arguments.decode_graphs == "on",
        world_size=1 if arguments.world_size is None else arguments.world_size,
        master_port=master_port(),
        workers=workers,
    )
    if not arguments.quiet:
        print(_loaded(llm), file=sys.stderr)
    if llm.config.notice:  # a warning
        print(f"note: {llm.config.notice}", file=sys.stderr)
    if not arguments.quiet:
        frames, shape = llm.config.num_frames, "-".join(map(str, llm.config.pooling_shape))
        print(
            f"ready after {time.perf_counter() - began:.1f} s: {counted(frames, 'frame')} pooled to {shape} = "
            f"{counted(llm.config.num_video_tokens, 'video token')}",
            file=sys.stderr,
        )
    return llm


def _loaded(llm: LLM) -> str:
    """What was loaded, where to, and the strength of its LoRA."""
    model, given = llm.model, llm.options
    what = given.model_path if given.load_format == "safetensors" else "random weights"
    on_top = "" if given.weight_dir is None else f" with {given.weight_dir}"
    dtype = str(model.dtype).removeprefix("torch.")
    weights = f"8-bit weights, {dtype}" if model.int8.names else dtype
    ranks = "" if model.parallel.size == 1 else f", {model.parallel.size} ranks"
    return f"loaded {what}{on_top}: {weights} on {model.ops.name}{ranks}, {llm.weights.lora or 'no LoRA'}"


def sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    """What the options say about generation."""
    return SamplingParams(
        max_tokens=arguments.max_output_length or SamplingParams.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
        ignore_eos=arguments.ignore_eos,
    )


def _limits(changes: Sequence[str]) -> MediaLimits:
    """MediaLimits with the `NAME=NUMBER` changes of the command line."""
    fields = {name: field.type for name, field in MediaLimits.__dataclass_fields__.items()}
    values: dict[str, Any] = {}
    for change in changes:
        name, _, number = change.partition("=")
        if name in values:
            raise ConfigError(f"--media_limit {name} is given twice, {values[name]:g} and {number}; give it once")
        try:
            values[name] = {int: int, float: float, "int": int, "float": float}[fields[name]](number)
            if not values[name] > 0:
                raise ValueError
        except (KeyError, ValueError):
            raise ConfigError(
                f"--media_limit {change!r}; it must be NAME=NUMBER above 0 with one of {', '.join(fields)}"
            ) from None
    return MediaLimits(**values)

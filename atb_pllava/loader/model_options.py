"""ModelOptions: which checkpoint, LoRA, dtype, backend and kernels. Rank 0 sends the options to every rank as JSON."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from atb_pllava.config import DTYPE_CHOICES, PllavaConfig, check_choice, check_num_frames, check_pooling_shape, option
from atb_pllava.errors import ConfigError
from atb_pllava.loader.checkpoint_config import read_config
from atb_pllava.loader.directory import config_directory
from atb_pllava.ops.registry import BACKENDS, KERNELS

LOAD_FORMATS = ("safetensors", "dummy", "dummy_w8a16")


@dataclass(frozen=True)
class ModelOptions:
    """Which checkpoint is loaded, and how its model computes.

    `model_path` is a checkpoint directory in any of the published layouts. `weight_dir` is a directory with LoRA
    tensors and other trained tensors. Its LoRA is merged, and its other tensors override those of `model_path`.
    The LoRA scale is `lora_alpha` / rank. None takes lora_alpha of PEFT's adapter_config.json beside the LoRA, else 4.
    A value that contradicts adapter_config.json is an error unless `ignore_adapter_config` is set.
    `num_frames` and `pooling_shape` None take the checkpoint's values. `load_format` "dummy" and "dummy_w8a16" read no
    tensors and fill the model with random weights, for benchmarks.
    `compiler` is the C++ compiler of the CPU kernels, and `kernel_dir` the folder of compiled kernels. For None see
    `ops.cpu.build.load_library`.
    """

    model_path: str | os.PathLike[str] = field(
        metadata=option("checkpoint directory, in any published layout", metavar="DIR")
    )
    weight_dir: str | os.PathLike[str] | None = field(
        default=None, metadata=option("training output (LoRA, projector) on top of it", metavar="DIR")
    )
    lora_alpha: float | None = field(
        default=None,
        metadata=option(
            "LoRA strength, scale = A / rank (default: what adapter_config.json beside the LoRA says, else 4)",
            metavar="A",
        ),
    )
    ignore_adapter_config: bool = field(
        default=False,
        metadata=option("scale the LoRA by --lora_alpha / rank, or 4 / rank, whatever its adapter_config.json says"),
    )
    num_frames: int | None = field(
        default=None, metadata=option("frames of each video (default: as stored, 16)", metavar="T")
    )
    pooling_shape: Sequence[int] | str | None = field(
        default=None,
        metadata=option("video tokens: frames-rows-columns (default: the checkpoint's, 16-12-12)", metavar="T-H-W"),
    )
    dtype: str = field(
        default="auto",
        metadata=option(
            "float32, bfloat16, float16 or auto (default): as stored; on a CPU bfloat16 where native, else float32",
            metavar="NAME",
            choices=DTYPE_CHOICES,
        ),
    )
    backend: str = field(
        default="auto",
        metadata=option("cpu, cuda, ascend; auto (default): the best here", metavar="NAME", choices=BACKENDS),
    )
    kernels: str = field(
        default="auto",
        metadata=option(
            "native (compiled with $CXX; Triton on CUDA), torch (none, slow) or auto (default): native if it works",
            metavar="NAME",
            choices=KERNELS,
        ),
    )
    load_format: str = field(
        default="safetensors",
        metadata=option(
            "safetensors (default); dummy or dummy_w8a16: made-up weights, for benchmarks",
            metavar="NAME",
            choices=LOAD_FORMATS,
        ),
    )
    compiler: str | None = None
    kernel_dir: str | None = None

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPE_CHOICES)
        check_choice("load_format", self.load_format, LOAD_FORMATS)
        for name in ("model_path", "weight_dir"):
            path = getattr(self, name)
            object.__setattr__(self, name, None if path is None else os.fspath(path))
        if self.num_frames is not None:
            object.__setattr__(self, "num_frames", check_num_frames(self.num_frames))
        if self.pooling_shape is not None:
            object.__setattr__(self, "pooling_shape", check_pooling_shape(self.pooling_shape))
        if self.load_format != "safetensors":
            self._refuse_lora()

    def _refuse_lora(self) -> None:
        """Raises ConfigError for a LoRA option, because dummy weights have no LoRA."""
        for name in ("weight_dir", "lora_alpha", "ignore_adapter_config"):
            if getattr(self, name) not in (None, False):
                raise ConfigError(f"{name} has no effect on load_format {self.load_format!r}; leave one of them out")

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ModelOptions":
        return cls(**json.loads(text))

    def described(self) -> str:
        """The options that ranks compare, as JSON. Paths are left out: ranks compare the weights by content."""
        here = dict.fromkeys(("model_path", "weight_dir", "compiler", "kernel_dir"))
        return json.dumps({**asdict(self), **here})

    def config(self) -> PllavaConfig:
        """The model's configuration, from config.json of `weight_dir` if that file exists, else of `model_path`."""
        directory, named_by = config_directory(self.model_path, self.weight_dir)
        return read_config(directory, named_by).with_video(self.num_frames, self.pooling_shape)

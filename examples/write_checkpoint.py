"""Writes a checkpoint directory with random weights, for measuring how long loading takes.

    python examples/write_checkpoint.py 7b DIR
    python -m atb_pllava bench load --model_path DIR

The checkpoint has shards of at most 4 GB, and one shard at a time is in memory.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package need not be installed

from atb_pllava.doctor.required_packages import require_packages

if __name__ == "__main__":
    require_packages()

import torch
from safetensors.torch import save_file

from atb_pllava.bench.shapes import shape_config, write_shape
from atb_pllava.cli import Parser
from atb_pllava.distributed.tensor_parallel import ShardSpec
from atb_pllava.loader.dummy_weights import DummyWeights
from atb_pllava.model.pllava import Pllava
from atb_pllava.ops.reference import TorchBackend

SHARD_BYTES = 4e9


def main() -> None:
    """Runs the command line, which the docstring of this file describes."""
    parser = Parser(
        prog="python examples/write_checkpoint.py", description="Write a checkpoint with random bfloat16 weights."
    )
    parser.add_argument("shape", help="1b, 7b, 13b, 34b or a config.json")
    parser.add_argument("directory", type=Path, help="directory to make")
    arguments = parser.parse_args()
    write(arguments.directory, arguments.shape)


def write(directory: Path, shape: str) -> None:
    """Writes config.json, tokenizer.json, shards and their index. The directory must not exist."""
    directory.mkdir(parents=True)
    write_shape(directory, shape)
    with torch.device("meta"):
        model = Pllava(shape_config(shape), TorchBackend(), torch.bfloat16)
    shards = plan_shards({name: part.shape for name, part in model.weight_map().items()})
    weight_map = {}
    for number, shapes in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: torch.empty(size, dtype=torch.bfloat16) for name, size in shapes.items()}
        weights = DummyWeights(sum(tensor.nbytes for tensor in tensors.values()))
        for _ in weights.load({name: ShardSpec.whole(tensor) for name, tensor in tensors.items()}):
            pass
        save_file(tensors, directory / file)
        weight_map.update(dict.fromkeys(tensors, file))
        print(f"{file}, {weights.bytes_total / 1e9:.1f} GB", file=sys.stderr)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def plan_shards(shapes: dict[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes of the tensors in each shard, in order."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if used + size > SHARD_BYTES and shards[-1]:
            shards.append({})
            used = 0
        shards[-1][name] = shape
        used += size
    return shards


if __name__ == "__main__":
    main()

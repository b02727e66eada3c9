"""Several ranks on CUDA: the GPU of a rank, what is refused by name, and equal answers, as far as a CPU can show."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from atb_pllava import LLM, BackendError, SamplingParams
from atb_pllava.distributed.rendezvous import Rendezvous, leave_process_group
from atb_pllava.distributed.tensor_parallel import TensorParallel
from atb_pllava.executor import launcher
from atb_pllava.loader import model_loader
from atb_pllava.loader.model_options import ModelOptions
from atb_pllava.ops.cuda import devices
from atb_pllava.ops.cuda.backend import CudaBackend
from atb_pllava.ops.cuda.torch_builds import Driver
from atb_pllava.ops.interface import Feature
from atb_pllava.ops.reference import TorchBackend
from atb_pllava.ops.registry import get_backend
from tests.support import assert_same_outputs, load_llm, random_frames

pytest.importorskip("triton")

FRAMES = random_frames(4, 60, 80, 3, seed=3)
REQUESTS = [{"prompt": "USER:<image> what is it? ASSISTANT:", "frames": FRAMES}, {"prompt": "USER: hello ASSISTANT:"}]
GREEDY = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=-1)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """torch says that it has three GPUs and NCCL. The result lists the devices that were made current."""
    current: list[torch.device] = []
    properties = SimpleNamespace(multi_processor_count=4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(CudaBackend, "_try_kernels", lambda _: None)
    return current


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_rank_r_takes_the_r_th_visible_gpu(gpus: list[torch.device], kernels: str) -> None:
    for rank in range(3):
        backend = get_backend("cuda", rank, kernels)
        assert type(backend) is (TorchBackend if kernels == "torch" else CudaBackend)
        assert backend.device == torch.device("cuda", rank) == gpus[-1]
        assert backend.supports(Feature.TENSOR_PARALLEL) and backend.ranks_sharing_memory(3) == 1
        assert backend.process_group == "cpu:gloo,cuda:nccl"
        backend.check_world_size(3)
    with pytest.raises(
        BackendError, match="rank 3 needs GPU 3, and torch sees 3 GPUs: .* more in CUDA_VISIBLE_DEVICES"
    ):
        get_backend("cuda", 3, kernels)
    assert len(gpus) == 3


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_too_few_gpus_are_refused_before_a_rank_starts(
    checkpoint: Path, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(launcher, "start_workers", lambda *_: pytest.fail("a rank was started"))
    message = "world_size 2 needs 2 GPUs, and torch sees 1 GPU: lower --world_size or name more in CUDA_VISIBLE_DEVICES"
    with pytest.raises(BackendError, match=message):
        LLM(checkpoint, backend="cuda", kernels=kernels, world_size=2)


@pytest.mark.usefixtures("gpus")
def test_a_torch_without_nccl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    backend = get_backend("cuda", kernels="torch")
    with pytest.raises(BackendError, match=r"world_size 2 needs NCCL, and torch \S+ was built without it"):
        backend.check_world_size(2)


@pytest.mark.parametrize(
    ("cuda", "driver", "words"),
    [
        (None, None, "finds no CUDA device here, and this machine has no NVIDIA driver; or use --backend cpu"),
        (
            None,
            Driver(580, (13, 0)),
            "was built without CUDA, .*580 for CUDA 13.0 is here: .* -m pip install torch==.*cu130",
        ),
        ("13.0", Driver(550, (12, 4)), "finds no CUDA device here, .* older than CUDA 13.0: .* torch==.*cu126"),
    ],
)
def test_without_a_gpu_the_message_names_what_to_type(
    cuda: str | None, driver: Driver | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(devices, "sees_nvidia_gpu", lambda: driver is not None)
    monkeypatch.setattr(devices, "read_driver", lambda: driver)
    with pytest.raises(BackendError, match=f"backend 'cuda': torch .*{words}"):
        get_backend("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton interprets on a CPU only")
# The warm-up reads a KV cache that nothing was written to: numpy, in the interpreter, warns of what it finds there.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value|All-NaN slice) encountered:RuntimeWarning")
@pytest.mark.parametrize("weights", ["safetensors", "dummy_w8a16"])
def test_two_ranks_give_the_answers_of_one(checkpoint: Path, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.ops.cuda_rank import InterpretedBackend

    def start_workers(size: int, options: ModelOptions, port: int | None) -> Rendezvous:
        return Rendezvous.start(size, "tests.ops.cuda_rank", [os.getcwd(), options.to_json()], port)

    options = {"load_format": weights, "max_batch_size": 2, "block_size": 16}
    alone = load_llm(checkpoint, **options).generate(REQUESTS, GREEDY)
    monkeypatch.setattr(model_loader, "get_backend", InterpretedBackend)
    monkeypatch.setattr(launcher, "start_workers", start_workers)
    with load_llm(checkpoint, world_size=2, **options) as llm:
        together = llm.generate(REQUESTS, GREEDY)
        ops: Any = llm.model.ops
        assert ops.captured == 2 and ops.replays >= 5 and ops.freed == 0
    assert_same_outputs(together, alone)
    assert ops.freed == 2, "NCCL waits for the graphs that hold its collectives"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NCCL needs a GPU")
def test_a_graph_holds_collectives_of_nccl() -> None:
    """With one rank, because NCCL takes a GPU for each rank."""
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    ops = get_backend("cuda")
    x = torch.ones(3, 4, device=ops.device)

    def step() -> torch.Tensor:
        return ops.all_gather(ops.all_reduce(2 * x), 1)

    step()
    graph = ops.capture(step)
    for value in (3.0, 5.0):
        x.fill_(value)
        assert bool((graph.replay([]) == 2 * value).all())
    graph.free()
    leave_process_group()
    assert not dist.is_initialized()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
@pytest.mark.parametrize("weights", ["safetensors", "dummy_w8a16"])
def test_two_gpus_give_the_answers_of_one(checkpoint: Path, weights: str) -> None:
    options = {"load_format": weights, "dtype": "float32", "backend": "cuda", "kernels": "native"}
    with LLM(checkpoint, max_batch_size=2, block_size=16, **options) as llm:
        alone = llm.generate(REQUESTS, GREEDY)
    with LLM(checkpoint, max_batch_size=2, block_size=16, world_size=2, **options) as llm:
        together = llm.generate(REQUESTS, GREEDY)
    assert_same_outputs(together, alone)
    assert not dist.is_initialized()


def test_the_kv_cache_is_planned_for_the_fullest_rank(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(TorchBackend, "free_memory", lambda _: 10**9)
    monkeypatch.setattr(TensorParallel, "lowest", lambda _, value: asked.append(value) or 10**6)
    with load_llm(checkpoint, block_size=16) as llm:
        runner = llm.engine.core.executor.runner
        held = sum(part.nbytes for layer in runner.cache for part in layer)
    assert 0.8 * 5e5 < held <= 5e5 and asked == [10**9]


@pytest.mark.parametrize(
    ("backends", "abort", "called"),
    [
        ("cpu:gloo,cuda:nccl", True, "abort"),
        ("cpu:gloo,cuda:nccl", False, "destroy"),
        ("cpu:gloo", True, "destroy"),
    ],
)
def test_nccl_is_aborted_where_another_rank_may_be_gone(
    backends: str, abort: bool, called: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend_config", lambda: backends)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("destroy"))
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: calls.append("abort"), raising=False)
    leave_process_group(abort=abort)
    assert calls == [called]

"""Several Python threads call the compiled CPU kernels at once, and indices outside of the KV cache are refused."""

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from atb_pllava.errors import BackendError
from atb_pllava.ops.cpu.backend import NativeBackend
from atb_pllava.ops.forward_batch import AttentionMetadata, ForwardBatch, SequenceBatch
from atb_pllava.ops.int8 import quantise
from tests.ops.kernel_support import CacheShape, filled_caches
from tests.support import decode_metadata, prefill_metadata, random_tensor

CALLERS = 3
ROUNDS = 40
LENGTHS = [1500, 1, 700]


def kernel_calls(fast: NativeBackend, seed: int) -> list[Callable[[], Tensor]]:
    """Calls of every kind of kernel on data of this seed: products, attention, the KV cache, element-wise functions."""
    weights = [random_tensor(70, 128, seed=seed), random_tensor(70, 128, seed=seed).bfloat16()]
    packed = [fast.pack(weight) for weight in (*weights, quantise(weights[0], group_size=64, symmetric=False))]
    caches = filled_caches(fast, LENGTHS, CacheShape(128, 2, 64, torch.float32, torch.float32))
    (own_cache,) = fast.new_kv_cache(1, 1, 128, 2, 64, torch.int8)
    frames = random_tensor(3, 77, 2, 64, seed=seed)
    query = random_tensor(3, 4, 64, seed=seed)
    chunk = random_tensor(64, 2, 64, seed=seed)
    wide = random_tensor(40, 128, seed=seed)
    decoding = decode_metadata(fast, LENGTHS, caches.block_tables)
    chunks = prefill_metadata(fast, [64], [700], caches.block_tables[2:])

    def write() -> Tensor:
        fast.write_kv(chunk, chunk, own_cache, torch.arange(64))
        return own_cache[0][0, :, :64]

    return [
        lambda: fast.linear(wide, packed[0]),
        lambda: fast.linear(wide[:1], packed[0]),
        lambda: fast.linear(wide.bfloat16(), packed[1]),
        lambda: fast.linear(wide, packed[2]),
        lambda: fast.decode_attention(query, caches.native, decoding),
        lambda: fast.prefill_attention(chunk, chunk, chunk, caches.native, chunks),
        lambda: fast.encoder_attention(frames, frames, frames),
        write,
        lambda: fast.rms_norm(wide, wide[0], 1e-5),
        lambda: fast.rotary(chunk, chunk[:, 0, :32], chunk[:, 1, :32]),
        lambda: fast.swiglu(wide),
        lambda: fast.quick_gelu(random_tensor(2**16, seed=seed)),
    ]


def test_calls_of_several_threads_give_the_results_of_one(fast: NativeBackend) -> None:
    threads_before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        calls = [kernel_calls(fast, seed) for seed in range(CALLERS)]
        expected = [[call() for call in of_caller] for of_caller in calls]
        expected = [[result.clone() for result in of_caller] for of_caller in expected]
        wrong: list[tuple[int, int, object]] = []
        start = threading.Barrier(CALLERS)

        def hammer(caller: int) -> None:
            start.wait()
            for turn in range(ROUNDS):
                number = (turn + 5 * caller) % len(calls[caller])
                try:
                    if not torch.equal(calls[caller][number](), expected[caller][number]):
                        wrong.append((caller, number, "differs"))
                except Exception as error:
                    wrong.append((caller, number, error))

        threads = [threading.Thread(target=hammer, args=(caller,)) for caller in range(CALLERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(threads_before)
    assert not wrong


BAD_TABLES = [
    (33, [0, 1, 5]),
    (33, [0, -1, 2]),
    (33, [2**60, 1, 2]),
    (49, [0, 1, 2]),
    (2**62, [0, 1, 2]),
    (0, [0, 1, 2]),
]


@pytest.mark.parametrize(("context", "table"), BAD_TABLES)
def test_block_tables_and_contexts_outside_of_the_cache(fast: NativeBackend, context: int, table: list[int]) -> None:
    """The cache has five blocks of 16 tokens."""
    (cache,) = fast.new_kv_cache(1, 5, 16, 2, 64, torch.float32)
    query = random_tensor(1, 2, 64)
    tables = torch.tensor([table])
    with pytest.raises(BackendError, match="atb_decode: a slot, block number or context length .* outside of the KV"):
        fast.decode_attention(query, cache, decode_metadata(fast, [context], tables))
    with pytest.raises(BackendError, match="atb_prefill: a slot, block number or context length"):
        fast.prefill_attention(query, query, query, cache, prefill_metadata(fast, [1], [context], tables))


def test_the_last_block_and_slot_are_inside(fast: NativeBackend) -> None:
    (cache,) = fast.new_kv_cache(1, 5, 16, 2, 64, torch.float32)
    keys = random_tensor(16, 2, 64)
    fast.write_kv(keys, keys, cache, torch.arange(64, 80))
    out = fast.decode_attention(keys[:1], cache, decode_metadata(fast, [1], torch.tensor([[4]])))
    assert torch.allclose(out, keys[:1])


@pytest.mark.parametrize("slot", [-1, 80, 2**62, -(2**62)])
def test_slots_outside_of_the_cache(fast: NativeBackend, slot: int) -> None:
    (cache,) = fast.new_kv_cache(1, 5, 16, 2, 64, torch.float32)
    for part in cache:
        part.fill_(7)
    keys = random_tensor(2, 2, 64)
    with pytest.raises(BackendError, match="atb_write_kv: a slot"):
        fast.write_kv(keys, keys, cache, torch.tensor([3, slot]))
    assert all(bool((part == 7).all()) for part in cache), "a refused call wrote something"


def test_a_chunk_longer_than_its_context(fast: NativeBackend) -> None:
    (cache,) = fast.new_kv_cache(1, 5, 16, 2, 64, torch.float32)
    query = random_tensor(8, 2, 64)
    with pytest.raises(BackendError, match="atb_prefill"):
        fast.prefill_attention(query, query, query, cache, prefill_metadata(fast, [8], [7], torch.tensor([[0]])))


def step(fast: NativeBackend, **changes: object) -> AttentionMetadata:
    """Prepare a step that decodes one token of one sequence, with `changes` to the fields of the ForwardBatch."""
    row = torch.zeros(1, dtype=torch.int64)
    table = torch.zeros(1, 1, dtype=torch.int64)
    decode = SequenceBatch.of([1], [1], table)
    nothing = SequenceBatch.of([], [], table[:0])
    angles = torch.zeros(1, 1)
    return fast.prepare(replace(ForwardBatch(row, row, row, decode, nothing, row), **changes), angles, angles)


def test_steps_whose_parts_do_not_fit_together(fast: NativeBackend) -> None:
    rows = torch.zeros(2, dtype=torch.int64)
    table = torch.zeros(1, 2, dtype=torch.int64)
    assert len(step(fast).decode) == 1
    for changes in ({"slot_mapping": rows}, {"token_ids": rows}, {"decode": SequenceBatch.of([2], [2], table)}):
        with pytest.raises(BackendError, match="the step has . slots, and another number of tokens"):
            step(fast, **changes)
    unfit = [
        {"slot_mapping": rows[:1].int()},
        {"decode": SequenceBatch.of([1], [1], table.int())},
        {"decode": SequenceBatch.of([1], [1], table.expand(2, 2))},
        {"decode": SequenceBatch((0, 1), (1,), table, rows)},
        {"decode": SequenceBatch((0, 2, 1), (1, 1), table.expand(2, 2), rows)},
    ]
    for changes in unfit:
        with pytest.raises(BackendError, match="lengths, slots or block tables do not fit together"):
            step(fast, **changes)

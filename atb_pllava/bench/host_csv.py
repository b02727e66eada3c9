"""The tables that MindIE's model scripts write, with the columns their readers know, from our own measurement.

Their benchmark.csv has one data row, that of the last batch, which the LLaVA script then reads back, old or not. Here a
row is written for every batch that was measured, and nothing is read back.
"""

from statistics import mean
from typing import Any

from atb_pllava.bench.run import Round

Row = dict[str, Any]

BENCHMARK_COLUMNS = (
    "batch_size", "input_seq_len", "output_seq_len", "e2e_time(ms)", "prefill_time(ms)", "decoder_token_time(ms)",
    "prefill_count", "prefill_token_times", "decode_token_times", "prefill_average_time(ms)",
)  # fmt: skip
# As MindIE's LLaVA script means them; its own header misspells the fifth and has blanks in the sixth.
LLAVA_COLUMNS = (
    "batch", "input_len", "output_len", "embedding_len", "first_token_time(ms)", "non_first_token_time(ms)",
    "ResponseTime(ms)", "E2E Throughput Average(Tokens/s)",
)  # fmt: skip


def benchmark_row(measured: Round) -> Row:
    """Decoder times alone, without vision tower and media; steps with prompt tokens in them count as prefill.

    output_seq_len is what was generated; decoder_token_time the mean step that only decoded (empty without any).
    """
    metrics = [output.metrics for output in measured.outputs]
    prefills = [step.total - step.encode for step in measured.steps if step.prefilled]
    decodes = [step.total - step.encode for step in measured.steps if step.decoding and not step.prefilled]
    return {
        "batch_size": len(metrics),
        "input_seq_len": metrics[0].prompt_tokens,
        "output_seq_len": metrics[0].output_tokens,
        "e2e_time(ms)": _ms(sum(prefills) + sum(decodes)),
        "prefill_time(ms)": _ms(sum(prefills)),
        "decoder_token_time(ms)": _ms(mean(decodes)) if decodes else "",
        "prefill_count": len(prefills),
        "prefill_token_times": ",".join(f"{seconds:.4f}" for seconds in prefills),  # seconds, as the host's
        "decode_token_times": ",".join(f"{seconds:.4f}" for seconds in decodes),
        "prefill_average_time(ms)": _ms(mean(prefills)),
    }


def llava_row(measured: Round) -> Row:
    """What a user waits for: the first token includes reading the video and the vision tower; tokens are counted."""
    metrics = [output.metrics for output in measured.outputs]
    tokens = sum(m.output_tokens for m in metrics)
    return {
        "batch": len(metrics),
        "input_len": metrics[0].prompt_tokens - metrics[0].video_tokens,
        "output_len": metrics[0].output_tokens,
        "embedding_len": metrics[0].prompt_tokens,
        "first_token_time(ms)": _ms(mean(m.ttft for m in metrics)),
        "non_first_token_time(ms)": _ms(mean(m.tpot for m in metrics)),
        "ResponseTime(ms)": _ms(measured.seconds),
        "E2E Throughput Average(Tokens/s)": round(tokens / measured.seconds, 3),
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)

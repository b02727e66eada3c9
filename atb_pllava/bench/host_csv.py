"""The CSV tables of MindIE's model scripts, with MindIE's column names and our measurements.

MindIE's benchmark.csv has one row, of the last batch. MindIE's LLaVA script reads that row back even when an earlier
run wrote it. Here every measured batch has a row, and nothing is read back.
"""

from statistics import mean
from typing import Any

from atb_pllava.bench.run import BatchRun

Row = dict[str, Any]

BENCHMARK_COLUMNS = (
    "batch_size", "input_seq_len", "output_seq_len", "e2e_time(ms)", "prefill_time(ms)", "decoder_token_time(ms)",
    "prefill_count", "prefill_token_times", "decode_token_times", "prefill_average_time(ms)",
)  # fmt: skip
# MindIE's LLaVA script means these columns. Its own header misspells the fifth and has blanks in the sixth.
LLAVA_COLUMNS = (
    "batch", "input_len", "output_len", "embedding_len", "first_token_time(ms)", "non_first_token_time(ms)",
    "ResponseTime(ms)", "E2E Throughput Average(Tokens/s)",
)  # fmt: skip


def benchmark_row(measured: BatchRun) -> Row:
    """A row of benchmark.csv: times of the decoder, without vision tower and media reading.

    Steps with prompt tokens count as prefill. output_seq_len is the number of generated tokens. decoder_token_time is
    the mean time of a step that only decoded (empty when there was none).
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


def llava_row(measured: BatchRun) -> Row:
    """A row of the LLaVA table. The first token's time includes reading the video and the vision tower."""
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

"""Charts as PNG files, drawn by matplotlib: throughput and latency over batch size."""

import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from atb_pllava.errors import ConfigError
from atb_pllava.files import PLOT_TITLE, write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#1f77b4", "#d62728", "#2ca02c")
# For each panel its title, the unit of its vertical axis, and the columns of a sweep with their names in the legend.
_PANELS = (
    ("Throughput", "tokens/s", {"decode_tokens_per_s": "decoding", "e2e_tokens_per_s": "end to end"}),
    ("Time per output token (TPOT)", "ms", {"tpot_p50_ms": "p50", "tpot_p90_ms": "p90", "tpot_p99_ms": "p99"}),
)


def check_plotting(option: str) -> None:
    """Raise ConfigError when matplotlib is missing. Call it before the work whose numbers are plotted."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(f'{option} needs matplotlib: pip install "atb_pllava[plots]"') from None


def new_figure(title: str, width: float, height: float) -> "Figure":
    """An empty figure of `width` x `height` inches on white, with a title."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")
    figure.suptitle(title, fontsize=13)
    return figure


def save_figure(figure: "Figure", path: str | os.PathLike[str]) -> None:
    """Write a PNG file, whole or not at all. Raises ConfigError when it cannot be written.

    The title in the file's metadata tells `check_writable` that a later run may replace the file.
    """
    png = BytesIO()
    figure.savefig(png, format="png", metadata={"Title": PLOT_TITLE})
    write_bytes(path, png.getvalue())


def plot_sweep(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Plot the rows of a sweep over their batch size. Rows of batches that did not run are left out."""
    measured = [row for row in rows if row["status"] == "ok"]
    figure = new_figure(title, 12, 5)
    figure.subplots_adjust(left=0.06, right=0.98, top=0.82, bottom=0.11, wspace=0.16)
    for axes, (name, unit, lines) in zip(figure.subplots(1, 2), _PANELS, strict=True):
        axes.set_title(name, fontsize=11)
        axes.set_xlabel("batch size")
        axes.set_ylabel(unit)
        _draw_lines(axes, measured, lines)
    save_figure(figure, path)


def _draw_lines(axes: "Axes", rows: Sequence[Mapping[str, Any]], lines: Mapping[str, str]) -> None:
    """A line for each column of `lines`, on axes that begin at 0."""
    for color, (column, label) in zip(COLORS, lines.items(), strict=False):
        points = [(row["batch_size"], row[column]) for row in rows if row[column] != ""]
        axes.plot([x for x, _ in points], [y for _, y in points], "o-", color=color, label=label, linewidth=2)
    axes.grid(color="#dddddd")
    axes.set_axisbelow(True)
    if not rows:
        axes.text(0.5, 0.5, "no batch was measured", ha="center", va="center", transform=axes.transAxes)
        axes.set_xticks([])
        axes.set_yticks([])
        return
    axes.set_ylim(bottom=0)
    batches = [row["batch_size"] for row in rows]
    axes.set_xticks(batches if len(batches) <= 16 else batches[:: -(-len(batches) // 16)])
    axes.legend()

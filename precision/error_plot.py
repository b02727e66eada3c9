"""A PNG of the error of each layer: the vision tower on the left, the decoder on the right, on a logarithmic axis."""

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from atb_pllava.bench.plot import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")
LOWEST = 1e-9  # smaller errors are drawn as this one
MOST_TICKS = 16
LEGEND_COLUMNS = 2

Sides = Mapping[str, Mapping[str, float]]  # {side: {stage: relative error}}


def plot_errors(path: Path, panels: Mapping[str, Sides], title: str) -> None:
    """Draw a panel for each part of the model. Errors that are not finite are crosses on the upper edge.

    Raises ConfigError when the file cannot be written.
    """
    figure = new_figure(title, 13, 6)
    names = list(dict.fromkeys(side for sides in panels.values() for side in sides))
    colors = {side: COLORS[number % len(COLORS)] for number, side in enumerate(names)}
    errors = [error for sides in panels.values() for stages in sides.values() for error in stages.values()]
    finite = [max(error, LOWEST) for error in errors if isfinite(error)] or [LOWEST]
    bottom = min(finite) / 3
    top = max(*finite, 10 * bottom) * 3  # room for the crosses
    legend_rows = -(-len(names) // LEGEND_COLUMNS)
    figure.subplots_adjust(left=0.07, right=0.985, top=0.85, bottom=0.2 + 0.04 * legend_rows, wspace=0.05)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (part, sides) in zip(grid, panels.items(), strict=True):
        axes.set_title(part, fontsize=11)
        axes.set_xlabel("stage (numbers are layers)")
        axes.set_yscale("log")
        axes.set_ylim(bottom, top)
        axes.grid(color="#dddddd")
        axes.set_axisbelow(True)
        _draw_panel(axes, sides, colors, top)
    grid[0].set_ylabel("relative error of the hidden states")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=LEGEND_COLUMNS)
    save_figure(figure, path)


def _draw_panel(axes: "Axes", sides: Sides, colors: Mapping[str, str], top: float) -> None:
    stages = list(dict.fromkeys(stage for errors in sides.values() for stage in errors))
    if not stages:
        axes.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=axes.transAxes)
    _set_stage_ticks(axes, stages)
    for side, errors in sides.items():
        numbers = [number for number, stage in enumerate(stages) if stage in errors]
        values = [errors[stages[number]] for number in numbers]
        finite = [max(value, LOWEST) if isfinite(value) else float("nan") for value in values]
        axes.plot(numbers, finite, "o-", color=colors[side], label=side, linewidth=2, markersize=5)
        lost = [number for number, value in zip(numbers, values, strict=True) if not isfinite(value)]
        axes.plot(lost, [top] * len(lost), "x", color=colors[side], markersize=9, clip_on=False)


def _set_stage_ticks(axes: "Axes", stages: Sequence[str]) -> None:
    """Label stages without their part's name: `decoder layer 3` is 3, `decoder input` is input. Thin out the layers."""
    words = [stage.split(" ", 1)[1].removeprefix("layer ") for stage in stages]
    every = -(-len(words) // MOST_TICKS)
    following = [*words[1:], "0"]  # where ticks are close, a word would cover the number before it
    shown = [
        number
        for number, word in enumerate(words)
        if not word.isdigit() or (int(word) % every == 0 and (len(words) < 12 or following[number].isdigit()))
    ]
    axes.set_xticks(shown, [words[number] for number in shown])
    for label in axes.get_xticklabels():
        if not label.get_text().isdigit():
            label.set_rotation(35)
            label.set_horizontalalignment("right")

"""A PNG of error per layer, drawn with Pillow: vision tower on the left, decoder on the right, logarithmic upwards."""

from collections.abc import Mapping
from math import ceil, floor, isfinite, log10
from pathlib import Path

from PIL import Image, ImageDraw

from atb_pllava import ConfigError
from atb_pllava.bench.plot import plot_title

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")
SIZE, LEFT, TOP, BOTTOM, GAP = (1200, 560), 70, 60, 70, 40
LOWEST = 1e-9  # errors below it are drawn on the axis


def plot_errors(path: Path, sides: Mapping[str, Mapping[str, float]]) -> None:
    """Draw {side: {stage: relative error}}. Raises ConfigError when the file cannot be written."""
    stages = list(dict.fromkeys(stage for errors in sides.values() for stage in errors))
    parts = [[stage for stage in stages if stage.startswith(part)] for part in ("vision", "decoder")]
    values = [max(error, LOWEST) for errors in sides.values() for error in errors.values() if isfinite(error)]
    low, high = (floor(log10(min(values))), ceil(log10(max(values)))) if values else (-9, 0)
    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image)
    width = (SIZE[0] - 2 * LEFT - GAP) / 2
    for number, (name, part) in enumerate(zip(("vision tower", "decoder"), parts, strict=True)):
        axes = _Axes(draw, LEFT + number * (width + GAP), width, part, low, max(high, low + 1))
        axes.draw_frame(f"{name}: relative error of the hidden states")
        for colour, errors in zip(_colours(len(sides)), sides.values(), strict=True):
            axes.draw_curve([errors.get(stage) for stage in part], colour)
    for row, (colour, side) in enumerate(zip(_colours(len(sides)), sides, strict=True)):
        x = LEFT + row % 3 * 370
        y = 8 + row // 3 * 14
        draw.line((x, y + 6, x + 24, y + 6), fill=colour, width=3)
        draw.text((x + 30, y), side[:56], fill="black")
    try:
        image.save(path, "PNG", pnginfo=plot_title())
    except OSError as error:
        raise ConfigError(f"{path} could not be written: {error.strerror or error}") from None


class _Axes:
    """One panel: stages along x, powers of ten along y."""

    def __init__(
        self, draw: ImageDraw.ImageDraw, left: float, width: float, stages: list[str], low: int, high: int
    ) -> None:
        self.draw, self.left, self.width, self.stages, self.low, self.high = draw, left, width, stages, low, high

    def x(self, number: int) -> float:
        return self.left + self.width * (number + 0.5) / max(1, len(self.stages))

    def y(self, error: float) -> float:
        """Of an error; what is not finite stands on the upper edge."""
        share = (log10(max(error, LOWEST)) - self.low) / (self.high - self.low) if isfinite(error) else 1.0
        return SIZE[1] - BOTTOM - (SIZE[1] - BOTTOM - TOP) * min(1.0, max(0.0, share))

    def draw_frame(self, title: str) -> None:
        self.draw.text((self.left, TOP - 16), title, fill="black")
        for power in range(self.low, self.high + 1):
            y = self.y(10.0**power)
            self.draw.line((self.left, y, self.left + self.width, y), fill="#dddddd")
            self.draw.text((self.left - 34, y - 6), f"1e{power}", fill="black")
        every = ceil(len(self.stages) / 12) or 1
        for number, stage in enumerate(self.stages):
            x = self.x(number)
            word = stage.split(" ", 1)[1].removeprefix("layer ")
            if not word.isdigit() or int(word) % every == 0:
                lower = 0 if word.isdigit() else 14  # words stand below the numbers
                self.draw.text((x, SIZE[1] - BOTTOM + 6 + lower), word, fill="black", anchor="ma")
        edge = (self.left, TOP, self.left + self.width, SIZE[1] - BOTTOM)
        self.draw.rectangle(edge, outline="black")

    def draw_curve(self, errors: list[float | None], colour: str) -> None:
        points = [(self.x(i), self.y(error)) for i, error in enumerate(errors) if error is not None]
        if len(points) > 1:
            self.draw.line(points, fill=colour, width=2)
        for x, y in points:
            self.draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]

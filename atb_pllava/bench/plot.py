"""Throughput and latency over batch size as a PNG, drawn with Pillow alone."""

import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from math import ceil, floor, log10
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from atb_pllava.files import PLOT_TITLE, write_bytes

_SIZE, _PANEL, _LEFT, _TOP, _BOTTOM = (1200, 480), 600, 80, 70, 60
_INK, _GRID = (40, 40, 40), (225, 225, 225)
COLORS = ((31, 119, 180), (214, 39, 40), (44, 160, 44))
_PANELS = (
    ("tokens/s", {"decode_tokens_per_s": "decoding", "e2e_tokens_per_s": "end to end"}),
    ("ms a token", {"tpot_p50_ms": "TPOT p50", "tpot_p90_ms": "TPOT p90", "tpot_p99_ms": "TPOT p99"}),
)


def plot_sweep(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Write the plot of a sweep's rows; a row without a number leaves a gap. Raises ConfigError if it cannot."""
    image = Image.new("RGB", _SIZE, "white")
    draw = ImageDraw.Draw(image)
    _write(draw, title, _LEFT, 8, size=18)
    for number, (unit, lines) in enumerate(_PANELS):
        _draw_panel(draw, number * _PANEL, unit, lines, [row for row in rows if row["status"] == "ok"])
    png = BytesIO()
    image.save(png, "PNG", pnginfo=plot_title())
    write_bytes(path, png.getvalue())


def plot_title() -> PngInfo:
    """What tells `check_writable` that a PNG was drawn here."""
    info = PngInfo()
    info.add_text("Title", PLOT_TITLE)
    return info


def _draw_panel(
    draw: ImageDraw.ImageDraw, left: int, unit: str, lines: Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Axes from 0, a line for each column in `lines`, which gives its name in the legend."""
    batches = [row["batch"] for row in rows]
    step, top = nice_scale(max((row[name] for row in rows for name in lines if row[name] != ""), default=1.0))
    first, last = min(batches, default=1), max(batches, default=1)
    x0, x1, y0, y1 = left + _LEFT, left + _PANEL - 30, _SIZE[1] - _BOTTOM, _TOP

    def place(batch: float, value: float) -> tuple[float, float]:
        along = (batch - first) / (last - first) if last > first else 0.5
        return x0 + 20 + along * (x1 - x0 - 40), y0 - value / top * (y0 - y1)

    for i in range(round(top / step) + 1):
        y = place(first, i * step)[1]
        draw.line((x0, y, x1, y), fill=_GRID)
        _write(draw, f"{i * step:g}", x0 - 8, y, right=1.0, down=0.5)
    for batch in batches:
        _write(draw, str(batch), place(batch, 0)[0], y0 + 8, right=0.5)
    _write(draw, "batch", (x0 + x1) / 2, y0 + 30, right=0.5)
    _write(draw, unit, x0, y1 - 28)
    for number, (name, label) in enumerate(lines.items()):
        points = [place(row["batch"], row[name]) for row in rows if row[name] != ""]
        draw.line(points, fill=COLORS[number], width=3)
        for x, y in points:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=COLORS[number])
        _write(draw, label, x0 + 110 + 120 * number, y1 - 28, COLORS[number])


def _write(
    draw: ImageDraw.ImageDraw, text: str, x: float, y: float, color: tuple[int, int, int] = _INK,
    *, right: float = 0.0, down: float = 0.0, size: int = 14,
) -> None:  # fmt: skip
    """Text whose upper left corner is moved from (x, y) to the left and up by these parts of its width and height."""
    font = _font(size)
    _, _, width, height = draw.textbbox((0, 0), text, font=font)
    draw.text((x - right * width, y - down * height), text, fill=color, font=font)


def nice_scale(highest: float) -> tuple[float, float]:
    """Grid step of 1, 2 or 5 times a power of ten, and the multiple of it that reaches `highest` in at most 6 steps."""
    power = 10.0 ** floor(log10(highest / 6)) if highest > 0 else 1.0
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * 6 >= highest)
    return step, step * max(1, ceil(highest / step))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1
        return ImageFont.load_default()

"""The contact sheet of a video: the frames that the vision tower gets, in a grid, each with its number and time."""

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from atb_pllava.multimodal.processor import ProcessedVideo

USUAL_COLUMNS = 4
GAP = 8  # pixels between frames, and around the sheet
LABEL_HEIGHT = 28  # pixels below each frame
_FONT_SIZE = 18
_PAPER = (255, 255, 255)
_INK = (20, 20, 20)
_REPEATED_INK = (170, 60, 0)


@dataclass(frozen=True)
class SheetLayout:
    """Where the frames of a contact sheet are. `frames` is their number, `side` the side of a frame in pixels."""

    frames: int
    side: int

    @property
    def columns(self) -> int:
        """4 columns for up to 16 frames. A sheet of more frames is about square."""
        return min(self.frames, max(USUAL_COLUMNS, math.ceil(math.sqrt(self.frames))))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the sheet in pixels."""
        rows = math.ceil(self.frames / self.columns)
        return GAP + self.columns * (self.side + GAP), GAP + rows * (self.side + LABEL_HEIGHT + GAP)

    def corner(self, number: int) -> tuple[int, int]:
        """Left and top of frame `number`, counted from 0, row by row."""
        row, column = divmod(number, self.columns)
        return GAP + column * (self.side + GAP), GAP + row * (self.side + LABEL_HEIGHT + GAP)


def draw_contact_sheet(video: ProcessedVideo) -> Image.Image:
    """The sheet of all T sampled frames. A frame that repeats an earlier one has a label that says so."""
    layout = SheetLayout(len(video.frame_indices), video.frames.shape[1])
    sheet = Image.new("RGB", layout.size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = _label_font()
    shown: set[int] = set()
    for number, place in enumerate(video.inverse_indices):
        left, top = layout.corner(number)
        sheet.paste(Image.fromarray(video.frames[place]), (left, top))
        ink = _REPEATED_INK if place in shown else _INK
        draw.text((left, top + layout.side + 4), _label(video, number, place in shown), fill=ink, font=font)
        shown.add(place)
    return sheet


def _label(video: ProcessedVideo, number: int, is_repeated: bool) -> str:
    seconds = video.frame_seconds
    time = "" if seconds is None else f"{seconds[number]:.2f} s   "
    again = "  (again)" if is_repeated else ""
    return f"{number + 1}   {time}frame {video.frame_indices[number]}{again}"


def _label_font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, so that the sheet is the same on every machine."""
    try:
        return ImageFont.load_default(_FONT_SIZE)
    except TypeError:  # Pillow 10.0 has its font in one size
        return ImageFont.load_default()

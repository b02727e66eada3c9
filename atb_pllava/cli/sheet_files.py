"""The PNG files of `inspect --contact_sheet`."""

import io
import os
from collections.abc import Sequence

from PIL.PngImagePlugin import PngInfo

from atb_pllava.errors import ConfigError
from atb_pllava.files import PLOT_TITLE, check_writable, write_bytes
from atb_pllava.multimodal.contact_sheet import draw_contact_sheet
from atb_pllava.multimodal.processor import ProcessedVideo


class SheetFiles:
    """The contact sheets of `media`. The one sheet of one medium is `path`. Sheet n of several is at `PATH_n.png`.

    Raises ConfigError, before a medium is read, for a path that does not end in .png or cannot be written, and for one
    that has a picture which is no contact sheet.
    """

    def __init__(self, path: str, media: Sequence[str]) -> None:
        stem, ending = os.path.splitext(path)
        if ending.lower() != ".png":
            raise ConfigError(f"--contact_sheet is {path!r}; its name must end in .png")
        self.paths = [path] if len(media) == 1 else [f"{stem}_{n + 1}{ending}" for n in range(len(media))]
        for name in self.paths:
            check_writable(name, "--contact_sheet", media)

    def write(self, number: int, video: ProcessedVideo) -> str:
        """Write the sheet of medium `number`, counted from 0. Returns its path."""
        title = PngInfo()
        title.add_text("Title", PLOT_TITLE)  # so that a later run may replace it
        content = io.BytesIO()
        draw_contact_sheet(video).save(content, "PNG", pnginfo=title)
        write_bytes(self.paths[number], content.getvalue())
        return self.paths[number]

"""The results gallery: a page in the browser over captions, predictions and evaluations.

The page sends the browser nothing but results, and the media that the results name. A medium is asked for by the
numbers of its file and row, so no URL has a path.
"""

from dataclasses import dataclass, field
from typing import Any

import gradio as gr
from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse

from atb_pllava.ui.chat_page import THEME
from atb_pllava.ui.gallery_html import (
    CSS,
    MEDIA_PATH,
    describe_files,
    describe_groups,
    describe_place,
    is_shown,
)
from atb_pllava.ui.page_files import accept_only_uploads
from atb_pllava.ui.result_set import ResultSet

PAGE_SIZE = 10


@dataclass
class View:
    """Where a visitor is: the first group of every page up to the one that is shown, and the next page's."""

    starts: list[int] = field(default_factory=lambda: [0])
    next_start: int = 0


def new_view() -> View:
    """The View of a new visitor."""
    return View()


Shown = tuple[str, str, View, Any, Any]


class GalleryActions:
    """What the page's buttons do. gradio calls each action on a thread of its own, with the visitor's View."""

    def __init__(self, results: ResultSet) -> None:
        self._results = results
        self._filters = results.filters

    def choices(self) -> list[tuple[str, str]]:
        """The filters, each with the number of its groups."""
        total = len(self._results)
        counts = {name: self._results.count(marks) if marks else total for name, marks in self._filters.items()}
        return [(f"{name} ({count})", name) for name, count in counts.items()]

    def begin(self, chosen: str, words: str) -> Shown:
        """The first page of a filter and a search."""
        return self._show(chosen, words, View())

    def go_on(self, chosen: str, words: str, view: View) -> Shown:
        """The next page."""
        return self._show(chosen, words, View([*view.starts, view.next_start]))

    def go_back(self, chosen: str, words: str, view: View) -> Shown:
        """The page before."""
        return self._show(chosen, words, View(view.starts[:-1] or [0]))

    def _show(self, chosen: str, words: str, view: View) -> Shown:
        page = self._results.page(view.starts[-1], PAGE_SIZE, self._filters.get(chosen, 0), words)
        view.next_start = page.end
        total = len(self._results)
        return (
            describe_groups(self._results, page.groups),
            describe_place(page.start, page.end, len(page.groups), total),
            view,
            gr.update(interactive=len(view.starts) > 1),
            gr.update(interactive=page.end < total),
        )


def create_gallery(results: ResultSet) -> FastAPI:
    """The application of a gallery: the page at / and its media."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get(f"/{MEDIA_PATH}/{{file}}/{{row}}")
    def medium(file: int, row: int) -> FileResponse:
        """The medium of a row. 404 for a row or a file that is not there, and for a file of another kind."""
        is_known = 0 <= file < len(results.files) and 0 <= row < len(results.files[file])
        path = results.files[file].medium(row) if is_known else None
        if path is None or not is_shown(path):
            raise HTTPException(404, "no such medium")
        return FileResponse(path, headers={"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox"})

    page = _page(GalleryActions(results), describe_files(results))
    accept_only_uploads(page)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        footer_links=[],
        allowed_paths=[],
        max_file_size=1,  # byte: nothing is uploaded
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        theme=THEME,
        css=CSS,
    )
    return app


def _page(actions: GalleryActions, files: str) -> Any:
    with gr.Blocks(title="PLLaVA results", analytics_enabled=False) as page:
        view = gr.State(new_view)
        gr.HTML(files, elem_id="files")
        with gr.Row():
            chosen = gr.Dropdown(actions.choices(), value="all", label="Rows", elem_id="filter", min_width=160)
            words = gr.Textbox(
                label="Search",
                placeholder="in ids, texts and errors: Enter begins",
                lines=1,
                max_lines=1,
                scale=3,
                min_width=280,
                elem_id="search",
            )
        with gr.Row(equal_height=True):
            back = gr.Button("Previous", min_width=110, scale=0, elem_id="back")
            forth = gr.Button("Next", min_width=110, scale=0, elem_id="forth")
            place = gr.Markdown(elem_id="place")
        rows = gr.HTML(elem_id="rows")
        shown = [rows, place, view, back, forth]
        gr.on([page.load, chosen.change, words.submit], actions.begin, [chosen, words], shown)
        forth.click(actions.go_on, [chosen, words, view], shown)
        back.click(actions.go_back, [chosen, words, view], shown)
    return page

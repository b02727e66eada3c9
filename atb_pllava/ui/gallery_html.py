"""The HTML of a gallery's page. Every text of a results file is escaped: such files come from anywhere."""

import os
from collections.abc import Sequence
from html import escape

from atb_pllava.errors import counted
from atb_pllava.files import IMAGE_ENDINGS, VIDEO_ENDINGS
from atb_pllava.ui.marks import ERROR, FLAGGED, RIGHT, WRONG
from atb_pllava.ui.result import Result
from atb_pllava.ui.result_set import ResultSet

MEDIA_PATH = "media"  # of the URLs, relative to the page
CSS = """
.gradio-container {max-width: 1280px !important; margin: auto}
.files {overflow-x: auto}
.files table, .files tr {border: none; border-collapse: collapse; width: auto}
.files td, .files th {border: none; border-bottom: 1px solid var(--border-color-primary); padding: 3px 16px 3px 0;
  text-align: left}
.files td:first-child {min-width: 150px; overflow-wrap: anywhere}
.files .number {text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap}
.result {display: grid; grid-template-columns: minmax(0, 320px) minmax(0, 1fr); gap: 18px; padding: 14px 0;
  border-top: 1px solid var(--border-color-primary)}
.result video, .result img {width: 100%; max-height: 260px; background: #0002; border-radius: 6px}
.result p {margin: 4px 0; overflow-wrap: anywhere}
.result .id, .result h3, .result .why, .result .asked {font-size: .85em; opacity: .75}
.result .asked {white-space: pre-wrap; font-style: italic}
.result .answers {display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 240px), 1fr)); gap: 14px;
  align-content: start}
.result article {background: var(--background-fill-secondary); border-radius: 6px; padding: 10px 12px; min-width: 0}
.result h3 {margin: 0; font-weight: 600; overflow-wrap: anywhere}
.result .text {white-space: pre-wrap}
.result .mark {display: inline-block; font-size: .8em; border-radius: 4px; padding: 0 6px; margin-right: 6px;
  background: #7774}
.result .error, .result .wrong {color: #b3261e}
.result .right {color: #1a6e33}
.dark .result .error, .dark .result .wrong {color: #ff8a80}
.dark .result .right {color: #6fdd8b}
@media (max-width: 700px) {.result {grid-template-columns: minmax(0, 1fr)}}
"""


def describe_files(results: ResultSet) -> str:
    """A table of the files: their rows, errors, right and wrong answers, and flagged rows."""
    heads = ["results", "rows", "errors", "right", "wrong", "flagged"]
    rows = ["".join(f'<th class="{"number" if number else ""}">{head}</th>' for number, head in enumerate(heads))]
    for label, file in zip(results.labels, results.files, strict=True):
        counts = [sum(1 for mark in file.marks if mark & bit) for bit in (ERROR, RIGHT, WRONG, FLAGGED)]
        cells = "".join(f'<td class="number">{count}</td>' for count in [len(file), *counts])
        rows.append(f'<td title="{escape(file.path)}">{escape(label)}</td>{cells}')
    return '<div class="files"><table>' + "".join(f"<tr>{row}</tr>" for row in rows) + "</table></div>"


def describe_groups(results: ResultSet, groups: Sequence[int]) -> str:
    """The groups of one page: each with its medium, and the answers of all files side by side."""
    return "".join(_group(results, group) for group in groups) or "<p>No row is like this.</p>"


def is_shown(path: str) -> bool:
    """Whether a file has the ending of a video or an image, which alone a browser is given."""
    return os.path.splitext(path)[1].lower() in IMAGE_ENDINGS | VIDEO_ENDINGS


def _group(results: ResultSet, group: int) -> str:
    found = results.results(group)
    present = [result for result in found if result is not None]
    questions = {result.question for result in present}
    shared = questions.pop() if len(questions) == 1 else None
    truths = {result.truth for result in present if result.truth is not None}
    truth = "".join(f'<p class="asked">Right: {escape(text)}</p>' for text in sorted(truths))
    asked = f'<p class="asked">{escape(shared)}</p>' if shared else ""
    head = f'{_medium(results, group, found)}<p class="id">{escape(present[0].id)}</p>{asked}{truth}'
    answers = "".join(
        _answer(label, result, shared is None) for label, result in zip(results.labels, found, strict=True)
    )
    return f'<section class="result"><div>{head}</div><div class="answers">{answers}</div></section>'


def _medium(results: ResultSet, group: int, found: Sequence[Result | None]) -> str:
    """The group's video or image from the first file that leads to it, else where it should be."""
    missing = ""
    for number, (file, result) in enumerate(zip(results.files, found, strict=True)):
        if result is None or not result.media:
            continue
        path = file.medium_of(result)
        row = results.row_number(number, group)
        if path is not None and is_shown(path):
            url = f"{MEDIA_PATH}/{number}/{row}"
            if os.path.splitext(path)[1].lower() in IMAGE_ENDINGS | {".gif"}:
                return f'<img src="{url}" alt="" loading="lazy">'
            # A browser opens 6 connections to a host, and a video that it preloads may hold one for ever.
            return f'<video src="{url}{_fragment(result)}" controls preload="none" muted></video>'
        missing = missing or f'<p class="why">not here: {escape(result.media[0])}</p>'
    return missing


def _fragment(result: Result) -> str:
    """The part of the video that the answer is about, as a media fragment (W3C, Media Fragments URI)."""
    if result.start_seconds is None and result.end_seconds is None:
        return ""
    end = "" if result.end_seconds is None else f",{result.end_seconds:g}"
    return f"#t={result.start_seconds or 0:g}{end}"


def _answer(label: str, result: Result | None, with_question: bool) -> str:
    if result is None:
        return f'<article><h3>{escape(label)}</h3><p class="why">no row</p></article>'
    asked = f'<p class="asked">{escape(result.question)}</p>' if with_question and result.question else ""
    if result.error is not None:
        kind = f" ({escape(result.kind)})" if result.kind else ""
        said = f'<p class="error">error{kind}: {escape(result.error)}</p>'
    else:
        said = f'<p class="text">{escape(result.text or "")}</p>'
    verdict = {None: "", True: '<span class="mark right">right</span>', False: '<span class="mark wrong">wrong</span>'}
    flags = "".join(f'<span class="mark">{escape(flag)}</span>' for flag in result.flags)
    return f"<article><h3>{escape(label)}</h3>{asked}{said}{verdict[result.is_right]}{flags}</article>"


def describe_place(start: int, end: int, shown: int, total: int) -> str:
    """One line about a page: `rows 1 to 10 of 100000`, with the number of rows shown where others are left out."""
    looked_at = f"rows {start + 1} to {end} of {total}" if end > start else f"{counted(total, 'row')}, all looked at"
    return looked_at if shown == end - start else f"{counted(shown, 'row')} of this kind among {looked_at}"

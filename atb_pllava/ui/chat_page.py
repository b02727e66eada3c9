"""The page in the browser: a chat about videos, with the frames that the model sees. It asks the server's own API.

`mount_chat_page` adds the page to a server's application. `chat_actions` has what the page's buttons do.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from atb_pllava.ui.chat_actions import ChatActions, new_conversation
from atb_pllava.ui.page_files import accept_only_uploads

PAGE_PATH = "/ui"
_LARGEST_UPLOAD = 512 * 2**20  # bytes, as MediaLimits.max_bytes
_SECONDS_BETWEEN_DELETIONS = 600
_SECONDS_OF_A_FILE = 4 * 3600  # an upload that is older is deleted
_CSS = ".gradio-container {max-width: 1280px !important; margin: auto}"
# System fonts: the default theme would load fonts from another host.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def mount_chat_page(
    app: Any,
    actions: ChatActions,
    *,
    max_frames: int,
    examples: Sequence[str] = (),
    check_key: Callable[[str], bool] | None = None,
    root_path: str = "",
) -> None:
    """Add the page to a FastAPI application under PAGE_PATH.

    max_frames: the most frames that a visitor may choose. examples: paths of videos to pick from. check_key: with API
    keys, the page asks for a key as a password, and this function says whether it is one. root_path: the path prefix
    that a proxy in front removes.
    """
    auth = None if check_key is None else lambda name, key: check_key(key)
    page = _page(actions, max_frames, examples)
    accept_only_uploads(page)
    gr.mount_gradio_app(
        app,
        page,
        path=PAGE_PATH,
        footer_links=[],
        auth=auth,
        auth_message="Any name, and an API key as the password.",
        root_path=f"{root_path}{PAGE_PATH}" if root_path else None,
        allowed_paths=sorted({os.path.dirname(os.path.abspath(path)) for path in examples}),
        max_file_size=_LARGEST_UPLOAD,
        show_error=False,  # only errors that are meant for visitors, which are gr.Error
        ssr_mode=False,
        enable_monitoring=False,
        theme=THEME,
        css=_CSS,
    )


def _page(actions: ChatActions, max_frames: int, examples: Sequence[str]) -> Any:
    delete_cache = (_SECONDS_BETWEEN_DELETIONS, _SECONDS_OF_A_FILE)
    with gr.Blocks(title="PLLaVA", analytics_enabled=False, delete_cache=delete_cache) as page:
        conversation = gr.State(new_conversation)
        about_model = gr.Markdown(elem_id="about_model")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                video = gr.Video(label="Video", sources=["upload"], height=260, elem_id="video")
                if examples:
                    gr.Examples([[path] for path in examples], [video], label="Examples", examples_per_page=6)
                num_frames = gr.Slider(
                    1, max_frames, min(16, max_frames), step=1, label="Frames", visible=max_frames > 1
                )
                about = gr.Markdown(elem_id="about_video")
                frames = gr.Gallery(label="What the model sees", columns=4, height=300, elem_id="frames")
            with gr.Column(scale=3, min_width=320):
                chat = gr.Chatbot(label="Chat", height=480, elem_id="chat", buttons=["copy"])
                question = gr.Textbox(
                    "", label="Question", placeholder="What happens in the video?", lines=1, elem_id="question"
                )
                with gr.Row():
                    send = gr.Button("Ask", variant="primary", min_width=80, elem_id="ask")
                    stop = gr.Button("Stop", min_width=80, elem_id="stop")
                    anew = gr.Button("New chat", min_width=80, elem_id="new_chat")
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    system = gr.Textbox("", label="System text", placeholder="the model's own", lines=2)
                    temperature = gr.Slider(0.0, 2.0, 0.0, step=0.05, label="Temperature (0: the likeliest answer)")
                    num_beams = gr.Slider(1, 5, 1, step=1, label="Beams (above 1: beam search, at temperature 0)")
                    max_tokens = gr.Slider(1, 1024, 200, step=1, label="Longest answer, in tokens")
        page.load(actions.describe_model, None, [about_model])
        gr.on(
            [video.change, num_frames.release],
            actions.show_video,
            [video, num_frames, conversation],
            [conversation, frames, about],
        )
        asking = gr.on(
            [send.click, question.submit],
            actions.ask,
            [question, conversation, system, temperature, num_beams, max_tokens],
            [question, conversation, chat],
            concurrency_limit=None,
        )
        stop.click(None, cancels=[asking])
        anew.click(actions.begin_anew, [conversation], [conversation, chat, video, frames, about], cancels=[asking])
    return page

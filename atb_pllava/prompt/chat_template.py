"""Conversation templates, and prompts in which every video has its full number of placeholder tokens.

The formats (roles, separators, where the media goes, answer prefixes) are PLLaVA's, tasks/eval/eval_utils.py; the long
system texts are our own words and can be replaced.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from atb_pllava.config import check_choice
from atb_pllava.errors import ConfigError, RequestError
from atb_pllava.prompt.tokenizer import IMAGE_TOKEN, Piece

DEFAULT_PROMPT = "Describe the video in details."  # PLLaVA's own words

_DEMO = (
    "You are a capable assistant for questions about videos. Watch the video the user provides, use any further "
    "information given, follow the user's instructions, and say only what the video supports."
)
_CAPTION = (
    "Describe this video with attention to every object in it, in at most six sentences, so precisely that the video "
    "could be made again from the words alone. Two examples of good descriptions: 1. An elderly fisherman in a yellow "
    "raincoat rows a small wooden boat across a grey lake at dawn. Mist drifts over the water, his oars leave rings "
    "that spread slowly, and the camera follows him from the shore. 2. Aerial view of a red train crossing a stone "
    "viaduct between forested hills in autumn. Steam trails behind it, the low sun throws long shadows over orange "
    "leaves, and a river glitters far below."
)
# The second and third sentence stand without a blank between them, as in the format this follows.
_VCG = (
    "You are a video chat assistant that understands both images and language. You watch the video that the user "
    "provides and help with questions about it in natural language.Follow the instructions closely and explain your "
    "answers in detail on the basis of the video."
)
_MVBENCH = (
    "Watch the video carefully, pay attention to the order of events and to the way objects and people move, then "
    "select the best option that answers the question.\n"
)
_RECAPTION = (
    "You are a capable assistant that describes videos.\n"
    "You receive a video and write a new caption that covers its objects, people, actions and scene.\n"
    "### INSTRUCTIONS:\n"
    "1. Follow the user's instruction.\n"
    "2. Describe only what can be seen.\n"
)
_VIDEOQA_BEFORE = (
    "Look at the key frames of the video, answer the question in a few words first, then elaborate on what the video "
    "shows. Question:"
)


@dataclass(frozen=True)
class Conversation:
    """How turns become one prompt: system text, roles, separators after a user's and an assistant's turn.

    `media` stands in front of the question in the same turn, or alone in a turn of its own (`media_alone`), which
    comes before the question unless `question_first`.
    """

    system: str = ""
    user: str = "USER:"
    assistant: str = "ASSISTANT:"
    user_end: str = " "
    assistant_end: str = "</s>"
    media: str = IMAGE_TOKEN
    media_alone: bool = False
    question_first: bool = False
    before_question: str = ""
    after_question: str = ""
    answer_prefix: str = ""


def _chatml(system: str, **options: object) -> Conversation:
    return Conversation(
        system=system, user="<|im_start|>user\n", assistant="<|im_start|>assistant\n", user_end="<|im_end|>\n",
        assistant_end="<|im_end|>\n", media=f"{IMAGE_TOKEN}\n", **options)  # type: ignore[arg-type]  # fmt: skip


def _eval(system: str, **options: object) -> Conversation:
    return Conversation(system=system, user="USER: ", media=f"{IMAGE_TOKEN}\n", **options)  # type: ignore[arg-type]


_VIDEOQA = {"before_question": _VIDEOQA_BEFORE, "after_question": "\n", "answer_prefix": "\nAnswer: In the video,"}

CONVERSATIONS: dict[str, Conversation] = {
    "plain": Conversation(),
    "eval_vcgbench": _eval(_VCG, media_alone=True),
    "eval_mvbench": _eval(_MVBENCH, media_alone=True),
    "eval_recaption": _eval(_RECAPTION, media_alone=True),
    "eval_videoqabench": _eval("", **_VIDEOQA),
    "eval_vcg_llavanext": _chatml(_VCG, media_alone=True),
    "eval_mvbench_llavanext": _chatml(_VCG, media_alone=True),
    "eval_recaption_llavanext": _chatml(_RECAPTION, media_alone=True),
    "eval_videoqa_llavanext": _chatml("<|im_start|>system\nAnswer the question.", **_VIDEOQA),
    # The published demo, and the NPU port's script, which asks before it shows the video.
    "demo": Conversation(system=_DEMO, media=f"{IMAGE_TOKEN} ", media_alone=True),
    "npu": Conversation(system=_DEMO, media=f"{IMAGE_TOKEN} ", media_alone=True, question_first=True),
}


def choose_conversation(
    name: str | None, *, chatml: bool, system: str | None = None, video_caption: bool = False
) -> Conversation:
    """The template called `name`, or the model's usual one: `plain` for Vicuna, ChatML for 34B.

    `system` replaces the template's system text. `video_caption` is the NPU port's captioning mode: its order of
    turns, and a system text that asks for a description to re-generate the video from.
    """
    if name is None and video_caption:
        name = "eval_recaption_llavanext" if chatml else "npu"
    elif name is None:
        name = "eval_vcg_llavanext" if chatml else "plain"
    conversation = CONVERSATIONS[check_choice("conversation", name, tuple(CONVERSATIONS))]
    if system is None and video_caption:
        system = _CAPTION
    if system is None:
        return conversation
    if not isinstance(system, str) or IMAGE_TOKEN in system:
        raise ConfigError(f"system is {system!r}; it must be a text without {IMAGE_TOKEN}")
    return Conversation(**{**conversation.__dict__, "system": system})


@dataclass(frozen=True)
class Turn:
    """What a user says, with how many videos, and what was answered; the last turn of a prompt has no answer yet."""

    question: str
    videos: int = 0
    answer: str | None = None


def render(
    conversation: Conversation,
    question: str,
    *,
    videos: int = 1,
    history: Sequence[tuple[str, str]] = (),
    answer_prefix: str | None = None,
) -> list[Piece]:
    """The prompt for `question` after earlier (question, answer) turns, up to where the answer begins.

    All videos belong to the first turn. Only the template's own placeholders count: an `<image>` in a question or an
    earlier answer is plain text.
    """
    turns = [*(Turn(asked, answer=answered) for asked, answered in history), Turn(question)]
    turns[0] = replace(turns[0], videos=videos)
    return render_turns(conversation, turns, answer_prefix=answer_prefix)


def render_turns(
    conversation: Conversation, turns: Sequence[Turn], *, system: str | None = None, answer_prefix: str | None = None
) -> list[Piece]:
    """Like `render`, for turns that bring their own videos; `system` is a user's system text for this prompt."""
    given = Piece(conversation.system) if system is None else Piece(system, from_user=True)
    pieces = [given, Piece(conversation.user_end)] if given.text else []
    for turn in turns:
        pieces += _user_turn(conversation, turn.question, turn.videos)
        pieces.append(Piece(conversation.assistant))
        if turn.answer is not None:
            pieces += [Piece(turn.answer, from_user=True), Piece(conversation.assistant_end)]
    prefix = Piece(conversation.answer_prefix) if answer_prefix is None else Piece(answer_prefix, from_user=True)
    return [*pieces, prefix]


def _user_turn(conversation: Conversation, question: str, videos: int) -> list[Piece]:
    user, end = conversation.user, conversation.user_end
    before = f"{conversation.before_question} " if conversation.before_question else ""
    after = f" {conversation.after_question}" if conversation.after_question else ""
    asked = [Piece(before), Piece(question, from_user=True), Piece(after + end)]
    if not videos:
        return [Piece(user), *asked]
    media = conversation.media * videos
    if not conversation.media_alone:
        return [Piece(f"{user}{media} "), *asked]
    shown, question_turn = [Piece(user + media + end)], [Piece(user), *asked]
    return question_turn + shown if conversation.question_first else shown + question_turn


@dataclass(frozen=True)
class VideoSpan:
    """Where one video's tokens stand in the expanded prompt."""

    start: int
    length: int


def expand_placeholders(
    token_ids: Sequence[int], image_token_id: int, videos: int, tokens_per_video: int
) -> tuple[list[int], list[VideoSpan]]:
    """Replace each image token by `tokens_per_video` of them, so that the prompt has its true length.

    Raises RequestError when the prompt does not have exactly one image token for each video.
    """
    found = sum(token == image_token_id for token in token_ids)
    if found != videos:
        raise RequestError(
            f"the prompt has {found} {IMAGE_TOKEN} and the request {videos} video(s) or image(s); "
            f"write {IMAGE_TOKEN} exactly once for each of them"
        )
    expanded: list[int] = []
    spans = []
    for token in token_ids:
        if token == image_token_id:
            spans.append(VideoSpan(len(expanded), tokens_per_video))
            expanded += [token] * tokens_per_video
        else:
            expanded.append(token)
    return expanded, spans

"""Conversation templates: the turns of a dialogue become one prompt, a list of Pieces with an `<image>` per video.

`placeholders.py` expands each `<image>` later.

The formats (roles, separators, place of the media, answer prefixes) are PLLaVA's, tasks/eval/eval_utils.py. The long
system texts are this project's own words, and a caller can replace them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from atb_pllava.config import check_choice
from atb_pllava.errors import ConfigError
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
# No blank stands between the second and the third sentence, as in PLLaVA's text.
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
    """A conversation template: separators, the place of the media, and texts around the question."""

    system: str = ""
    user: str = "USER:"  # begins a user's turn
    assistant: str = "ASSISTANT:"  # begins an assistant's turn
    user_end: str = " "  # ends a user's turn
    assistant_end: str = "</s>"  # ends an assistant's turn
    media: str = IMAGE_TOKEN  # written once for each video
    media_alone: bool = False  # True: the media have a turn of their own. False: the question's turn begins with them
    question_first: bool = False  # True: the turn of the media follows the turn of the question
    before_question: str = ""  # stands before every question
    after_question: str = ""  # stands after every question
    answer_prefix: str = ""  # the prompt ends with this beginning of the answer

    @property
    def turn_end(self) -> str:
        """The text of the token that ends an assistant's turn: `assistant_end` without blanks and line breaks."""
        return self.assistant_end.strip()


def _chatml(system: str, **options: object) -> Conversation:
    return Conversation(
        system=system,
        user="<|im_start|>user\n",
        assistant="<|im_start|>assistant\n",
        user_end="<|im_end|>\n",
        assistant_end="<|im_end|>\n",
        media=f"{IMAGE_TOKEN}\n",
        **options,  # type: ignore[arg-type]
    )


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
    # "demo" is PLLaVA's published demo. "npu" is the NPU port's script, in which the question precedes the video.
    "demo": Conversation(system=_DEMO, media=f"{IMAGE_TOKEN} ", media_alone=True),
    "npu": Conversation(system=_DEMO, media=f"{IMAGE_TOKEN} ", media_alone=True, question_first=True),
}


def choose_conversation(
    name: str | None, *, chatml: bool, system: str | None = None, video_caption: bool = False
) -> Conversation:
    """The template called `name`. Without a name: `plain`, or `eval_vcg_llavanext` for a `chatml` model (34B).

    `system` replaces the template's system text. `video_caption` is the captioning mode of the NPU port. The system
    text of `video_caption` asks for a description from which the video could be made again. Without a name,
    `video_caption` takes the template `npu`, or `eval_recaption_llavanext` for a `chatml` model.
    Raises ConfigError for an unknown name, and for a `system` that is no text or contains `<image>`.
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
    return replace(conversation, system=system)


@dataclass(frozen=True)
class Turn:
    """A user's question and the assistant's answer."""

    question: str
    videos: int = 0  # number of videos shown in this turn
    answer: str | None = None  # None in the last turn of a prompt


def render(
    conversation: Conversation,
    question: str,
    *,
    videos: int = 1,
    history: Sequence[tuple[str, str]] = (),
    answer_prefix: str | None = None,
) -> list[Piece]:
    """The prompt for `question` after a `history` of (question, answer) turns. The prompt ends where the answer begins.

    All videos are shown in the first turn. An `<image>` in a question or an earlier answer is plain text.
    `answer_prefix` replaces the template's own beginning of the answer.
    """
    turns = [*(Turn(asked, answer=answered) for asked, answered in history), Turn(question)]
    turns[0] = replace(turns[0], videos=videos)
    return render_turns(conversation, turns, answer_prefix=answer_prefix)


def render_turns(
    conversation: Conversation, turns: Sequence[Turn], *, system: str | None = None, answer_prefix: str | None = None
) -> list[Piece]:
    """The prompt of turns of which each has its own videos. The other rules are those of `render`.

    `system` replaces the template's system text. `system` is user text, in which `<image>` is plain text.
    """
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
    """A user's turn, or two of them when the media have a turn of their own."""
    user = conversation.user
    end = conversation.user_end
    before = f"{conversation.before_question} " if conversation.before_question else ""
    after = f" {conversation.after_question}" if conversation.after_question else ""
    asked = [Piece(before), Piece(question, from_user=True), Piece(after + end)]
    if not videos:
        return [Piece(user), *asked]
    media = conversation.media * videos
    if not conversation.media_alone:
        return [Piece(f"{user}{media} "), *asked]
    media_turn = [Piece(user + media + end)]
    question_turn = [Piece(user), *asked]
    return question_turn + media_turn if conversation.question_first else media_turn + question_turn

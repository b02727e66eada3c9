"""The training data of train_tiny_pllava.py: pixels, packed questions and auxiliary targets of clips."""

import random
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from render_shapes import COLOURS, MOVES, SHAPES, Clip, Thing, make_clip, render, sample_indices, write_video
from shape_questions import CAPTION_REQUESTS, LETTERS, SYSTEM, Question, caption, choice_prompt, plain_prompt, questions
from tokenizers import Tokenizer
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
EOS = 2
MOTIONS = ("still", *MOVES, "rotate")
EASY = ("count", "shape", "colour")
PLAIN_SYSTEMS = ("", "Look at the video and answer the question. ", "You are a helpful assistant. ")
GREETINGS = (
    ("Hello", "Hello! Show me a video of moving shapes."),
    ("Hello!", "Hello! Show me a video of moving shapes."),
    ("Hi", "Hello! Show me a video of moving shapes."),
    ("Who are you?", "I am a tiny model that describes videos of moving shapes."),
    ("What can you do?", "I can describe videos of moving shapes."),
    ("Thank you.", "You are welcome."),
    ("Can a circle be red?", "Yes."),
    ("Is a square a color?", "No."),
    ("Is red a color?", "Yes."),
    ("Is a star a color?", "No."),
)


def decode(video: str | Path) -> list[Image.Image]:
    """All frames of a video file."""
    import av

    with av.open(str(video)) as container:
        container.streams.video[0].thread_count = 1
        return [frame.to_image() for frame in container.decode(video=0)]


def _resize(image: Image.Image, short: int) -> Image.Image:
    width, height = image.size
    if width <= height:
        return image.resize((short, int(short * height / width)), Image.Resampling.BICUBIC)
    return image.resize((int(short * width / height), short), Image.Resampling.BICUBIC)


def preprocess(frame: Image.Image, size: int) -> np.ndarray:
    """A frame after the two bicubic resizes and the centre crop of inference: uint8 [size, size, 3]."""
    short, long = sorted(frame.size)
    frame = _resize(frame, max(min(short, int(min(640, long) / (long / short))), size))
    frame = _resize(frame, size)
    left = (frame.width - size) // 2
    top = (frame.height - size) // 2
    return np.asarray(frame.crop((left, top, left + size, top + size)))


def coded_clip(seed: int, size: int = 112) -> np.ndarray:
    """The sampled frames of a clip after H.264 and the preprocessing of inference: uint8 [16, size, size, 3]."""
    clip = make_clip(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, render(clip), clip.fps, clip.crf)
        frames = decode(path)
    return np.stack([preprocess(frames[k], size) for k in sample_indices(len(frames))])


def drawn_clip(clip: Clip, size: int, rng: np.random.Generator, indices: list[int] | None = None) -> np.ndarray:
    """The sampled frames, drawn at the model's size: uint8 [16, size, size, 3].

    In place of a codec's losses half of the clips get another contrast and brightness, and many of these blur or coarse
    chroma.
    """
    frames = render(clip, indices or sample_indices(clip.frames), size, size)
    if rng.random() < 0.5:
        return frames
    x = frames.astype(np.float32)
    if rng.random() < 0.6:
        luma = x @ np.array([0.299, 0.587, 0.114], np.float32)
        chroma = x - luma[..., None]
        half = chroma.reshape(len(x), size // 2, 2, size // 2, 2, 3).mean((2, 4))
        x = luma[..., None] + half.repeat(2, 1).repeat(2, 2)
    if rng.random() < 0.6:
        weight = rng.uniform(0.1, 0.3)
        x = (1 - 2 * weight) * x + weight * (np.roll(x, 1, 1) + np.roll(x, -1, 1))
        x = (1 - 2 * weight) * x + weight * (np.roll(x, 1, 2) + np.roll(x, -1, 2))
    x = (x - 128) * rng.uniform(0.92, 1.08) + 128 + rng.uniform(-8, 8)
    return np.clip(x + 0.5, 0, 255).astype(np.uint8)


def normalise(frames: np.ndarray) -> Tensor:
    """Pixels uint8 [..., height, width, 3] to CLIP's normalised floats [..., 3, height, width]."""
    scale = 1 / (255 * torch.tensor(STD))
    shift = torch.tensor(MEAN) / torch.tensor(STD)
    return (torch.from_numpy(frames).float() * scale - shift).movedim(-1, -3)


def _history(thing: Thing, time: float) -> tuple[int, int, bool, int, bool]:
    """What an object has done by `time`, as five values.

    The values are its first motion, its latest motion (0: none yet), whether it has appeared, its colour before it
    turned (0: it has not turned, else 1 + index), and whether it has done anything.
    """
    begun = [step for step in thing.steps if time >= step.start + 0.08 * (step.end - step.start)]
    motions = [MOTIONS.index(step.action) for step in begun if step.action in MOTIONS]
    names = {step.action for step in begun}
    before = 1 + list(COLOURS).index(thing.colour) if "turn" in names else 0
    return motions[0] if motions else 0, motions[-1] if motions else 0, "appear" in names, before, bool(begun)


def states(clip: Clip) -> np.ndarray:
    """The state of both objects in every sampled frame, float32 [frames, 2, 15].

    The values are x, y, radius, visible, colour, shape, motion (-1: unknown), distance gone in x and in y, the five
    values of _history, and the index of the first colour.
    """
    names = list(COLOURS)
    out = np.zeros((len(sample_indices(clip.frames)), 2, 15), np.float32)
    for slot, thing in enumerate(clip.things):
        before = None
        first = None
        for row, index in enumerate(sample_indices(clip.frames)):
            time = index / (clip.frames - 1)
            x, y, angle, visible, colour = thing.state(time)
            motion = -1
            first = first or (x, y)
            if before is not None:
                dx = x - before[0]
                dy = y - before[1]
                turn = angle - before[2]
                if max(abs(dx), abs(dy)) > 0.008:
                    motion = MOTIONS.index(("left" if dx < 0 else "right") if dx else ("up" if dy < 0 else "down"))
                else:
                    motion = MOTIONS.index("rotate") if abs(turn) > 0.03 else 0
            before = (x, y, angle)
            look = (visible, names.index(colour), SHAPES.index(thing.shape))
            history = (*_history(thing, time), names.index(thing.colour))
            out[row, slot] = (x, y, thing.radius, *look, motion, x - first[0], y - first[1], *history)
    return out


@dataclass
class Cells:
    """The targets of the auxiliary heads for each cell of a grid over the frames, [frames, cells, ...]."""

    colours: Tensor  # float [.., 6], 1 where an object of that colour touches the cell
    shape: Tensor  # long, 0 for none, else 1 + index
    places: Tensor  # float [.., 4], centre of the nearest object, from the cell's and from the frame's centre, in cells
    shift: Tensor  # float [.., 2], how far that object has come since the first frame, in quarters of the frame
    motion: Tensor  # long, -100 where no object or unknown
    history: Tensor  # long [.., 4], the first four values of _history of that object, -100 where none
    frame: Tensor  # float [.., 13], colours seen by now, first colours of the objects that have acted by now, time


def cells(state: Tensor, grid: int) -> Cells:
    """Targets for frames divided into grid x grid cells, from states() [frames, 2, 15]."""
    half = 1 / grid
    line = torch.arange(grid) * 2 * half - 1 + half
    centre = torch.stack([line.repeat(grid), line.repeat_interleave(grid)], -1)  # x, y, row by row
    delta = state[:, None, :, :2] - centre[None, :, None]  # frames, cells, slots, 2
    distance = delta.norm(dim=-1)
    touches = (distance < state[:, None, :, 2] + 0.6 * half) & (state[:, None, :, 3] > 0)
    colour = torch.nn.functional.one_hot(state[..., 4].long(), len(COLOURS))[:, None] * touches[..., None]
    nearest = distance.masked_fill(~touches, 9.0).argmin(-1)
    some = touches.any(-1)

    def of_nearest(values: Tensor) -> Tensor:
        return values[:, None].expand(-1, grid * grid, -1).gather(2, nearest[..., None])[..., 0]

    shape = torch.where(some, of_nearest(state[..., 5]).long() + 1, 0)
    motion = of_nearest(state[..., 6]).long()
    offset = delta.gather(2, nearest[..., None, None].expand(-1, -1, 1, 2))[:, :, 0]
    centre_of_nearest = torch.stack([of_nearest(state[..., 0]), of_nearest(state[..., 1])], -1)
    places = torch.cat([offset / (2 * half), 2 * centre_of_nearest], -1)
    shift = 2 * torch.stack([of_nearest(state[..., 7]), of_nearest(state[..., 8])], -1)
    motion = torch.where(some & (motion >= 0), motion, -100)
    history = torch.stack([torch.where(some, of_nearest(state[..., k]).long(), -100) for k in range(9, 13)], -1)
    names = len(COLOURS)
    last = max(len(state) - 1, 1)
    seen = (torch.nn.functional.one_hot(state[..., 4].long(), names) * (state[..., 3:4] > 0)).amax(1).cummax(0).values
    acted = (torch.nn.functional.one_hot(state[..., 14].long(), names) * (state[..., 13:14] > 0)).amax(1)
    frame = torch.cat([seen, acted, torch.arange(len(state))[:, None] / last], 1)
    return Cells(
        colour.amax(2).float(), shape, places, shift, motion, history, frame[:, None].expand(-1, grid * grid, -1)
    )


@dataclass
class Text:
    """One question of a packed row."""

    ids: list[int]  # tokens after <image>
    learn: list[float]  # weight of each token in the loss
    options: list[tuple[int, int]]  # end of each option's line, and 1 for the right option, else 0
    task: str = ""
    hint: tuple[int, list[int]] | None = None  # end of the question's line and the tokens of the right option


class Writer:
    """Turns questions into token ids. Every prompt is encoded whole, exactly as inference encodes it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.encode = lru_cache(maxsize=200_000)(lambda text: tokenizer.encode(text).ids)
        self.image = tokenizer.token_to_id("<image>")
        self.letters = {tokenizer.token_to_id(letter) for letter in LETTERS}
        self.newline = tokenizer.token_to_id("<0x0A>")

    def turns(self, turns: list[tuple[str, str]]) -> tuple[list[int], list[float]]:
        """Ids of (prompt, answer) turns and the weight of each id in the loss: 1 for answers and their end, else 0.

        Raises ValueError when the tokens of a prompt change because of the answer behind it.
        """
        text = ""
        ids = []
        learn = []
        for prompt, answer in turns:
            text += prompt
            asked = self.encode(text)
            text += answer
            told = [*self.encode(text), EOS]
            if told[: len(asked)] != asked or asked[: len(ids)] != ids:
                raise ValueError(f"the tokens of {prompt!r} change when {answer!r} follows")
            learn += [0.0] * (len(asked) - len(learn)) + [1.0] * (len(told) - len(asked))
            ids = told
            text = text + "</s>"
        return ids, learn

    def text(self, turns: list[tuple[str, str]], task: str, choice: Question | None = None) -> Text:
        """One question of a packed row. `choice` is the question of a multiple-choice prompt."""
        ids, learn = self.turns(turns)
        at = ids.index(self.image) + 1 if self.image in ids else 1
        ids = list(ids[at:])
        learn = learn[at:]
        options = []
        hint = None
        if choice is not None:
            start = learn.index(1.0)
            lines = [k for k in range(start) if ids[k] == self.newline]
            place = lines[-len(choice.options) - 2]
            lines = lines[-len(choice.options) :]
            options = [(place, int(k == choice.correct)) for k, place in enumerate(lines)]
            hint = (place, [token for token in ids[start:-1] if len(self.tokenizer.id_to_token(token)) > 2])
            learn = [3.0 if w and ids[k] in self.letters else w for k, w in enumerate(learn)]
        return Text(ids, learn, options, task, hint)


def choice_answer(question: Question, mvbench: bool) -> str:
    """The right answer to a multiple-choice prompt."""
    text = f"{LETTERS[question.correct]}) {question.options[question.correct]}"
    return text if mvbench else f" ({text}"


def clip_texts(writer: Writer, clip: Clip, rng: random.Random, kind: str, room: int, focus: bool = False) -> list[Text]:
    """Questions about one clip, of at most `room` tokens in all. The first one asks for the caption.

    The questions share the prompt up to <image>: the MVBench prompt when `kind` is "mvbench", else the plain prompt
    behind the system text `kind`. `focus` makes most questions multiple choice and leaves out most of the EASY ones.
    """
    asked = questions(clip, rng.getrandbits(32))
    if focus:
        asked = [q for q in asked if q.task not in EASY or rng.random() < 0.3]
    rng.shuffle(asked)
    head = f"{SYSTEM} USER: <image>" if kind == "mvbench" else f"{kind}USER:<image>"
    tail = "\n USER: {} ASSISTANT:" if kind == "mvbench" else " {} ASSISTANT:"

    def opened(question: Question) -> tuple[str, str]:
        return question.question, " " + question.answer

    story = (rng.choice(CAPTION_REQUESTS), " " + caption(clip))
    first, answer = story
    texts = [writer.text([(head + tail.format(first), answer)], "caption")]
    used = len(texts[0].ids)
    for turn, question in enumerate(asked * 2):
        if turn < len(asked) and rng.random() < (0.9 if focus else 0.85 if kind == "mvbench" else 0.6):
            prompt = choice_prompt(question) if kind == "mvbench" else head + tail.format(question.choice_text())
            reply = choice_answer(question, kind == "mvbench")
            text = writer.text([(prompt, reply)], "mc_" + question.task, question)
        elif kind != "mvbench" and rng.random() < 0.15:
            before = story if rng.random() < 0.5 else opened(rng.choice(asked))
            follow = opened(question) if rng.random() < 0.8 else story
            turns = [(head + tail.format(before[0]), before[1]), (f"USER: {follow[0]} ASSISTANT:", follow[1])]
            text = writer.text(turns, "turns")
        else:
            ask, reply = opened(question)
            text = writer.text([(head + tail.format(ask), reply)], question.task)
        if used + len(text.ids) > room:
            continue
        texts.append(text)
        used += len(text.ids)
        if used > room - 14:
            break
    return texts


@dataclass
class Rows:
    """Packed questions of a batch: `B` clips with rows of `Q` tokens, behind a shared prefix of `P` tokens."""

    prefix: list[int]  # ids in front of the video
    ids: Tensor  # [B, Q]
    target: Tensor  # [B, Q], -100 where nothing is learnt
    weight: Tensor  # [B, Q]
    places: Tensor  # [B, Q] positions
    mask: Tensor  # [B, 1, Q, P + Q]
    options: Tensor  # [B, Q], -1 where no option line ends
    spans: list[list[tuple[str, int, int]]]  # per row: task, start, end
    hints: list[tuple[int, int, list[int]]]  # row, place and tokens of Text.hint


def pack(prefix: list[int], video_tokens: int, texts: list[list[Text]]) -> Rows:
    """Packs the questions of each clip into one row. A question attends to the prefix and to itself only."""
    length = max(sum(len(t.ids) for t in row) for row in texts)
    shape = (len(texts), length)
    start = len(prefix) + video_tokens
    ids = torch.zeros(shape, dtype=torch.long)
    places = torch.zeros(shape, dtype=torch.long)
    target = torch.full(shape, -100)
    weight = torch.zeros(shape)
    options = torch.full(shape, -1)
    owner = torch.full(shape, -1)
    spans: list[list[tuple[str, int, int]]] = []
    hints: list[tuple[int, int, list[int]]] = []
    for b, row in enumerate(texts):
        at = 0
        spans.append([])
        for number, text in enumerate(row):
            end = at + len(text.ids)
            ids[b, at:end] = torch.tensor(text.ids)
            owner[b, at:end] = number
            places[b, at:end] = torch.arange(start, start + len(text.ids))
            learn = torch.tensor(text.learn)[1:]
            weight[b, at : end - 1] = learn
            target[b, at : end - 1] = torch.where(learn > 0, torch.tensor(text.ids[1:]), -100)
            for place, truth in text.options:
                options[b, at + place] = truth
            if text.hint:
                hints.append((b, at + text.hint[0], text.hint[1]))
            spans[-1].append((text.task, at, end))
            at = end
    same = (owner[:, :, None] == owner[:, None]) & (places[:, :, None] >= places[:, None])
    mask = torch.cat([torch.ones(len(texts), length, start, dtype=torch.bool), same], 2)[:, None]
    return Rows(prefix, ids, target, weight, places, mask, options, spans, hints)


def corpus(clips: int) -> list[str]:
    """Texts that the tokenizer is trained on."""
    texts = [SYSTEM, *PLAIN_SYSTEMS, *CAPTION_REQUESTS] * 20
    texts += [plain_prompt(ask) + " " + answer for ask, answer in GREETINGS] * 5
    for seed in range(clips):
        clip = make_clip(seed)
        texts.append(caption(clip))
        for question in questions(clip):
            texts += [plain_prompt(question.choice_text()), question.answer, "Best option:"]
    return texts

"""Synthetic clips of moving coloured shapes, each fully determined by one seed.

    python examples/render_shapes.py --out DIR --count 200 --seed 900000

The command writes DIR/clip_<seed>.mp4 (H.264, yuv420p) for `count` consecutive seeds, and DIR/clips.json with one entry
for each clip: {"seed", "video", "width", "height", "frames", "fps", "caption", "facts", "questions"}. "facts" has the
form that shape_questions.parse_caption returns. Every question is {"task", "question", "answer", "options", "correct"}:
"options" are the texts of the choices in the order to show them, "correct" is the index of the right one.

Positions are in units of half the short edge of the frame, measured from its centre, x to the right and y down. Objects
stay inside the centre square, the only part of a frame that the model sees. Times run from 0 (first frame) to 1 (last
frame).
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package need not be installed

from atb_pllava.doctor.required_packages import require_packages

if __name__ == "__main__":
    require_packages()

import numpy as np

from atb_pllava.cli import Parser

T = TypeVar("T")
COLOURS = {
    "red": (215, 35, 35),
    "green": (35, 165, 50),
    "blue": (35, 75, 215),
    "yellow": (235, 215, 40),
    "purple": (150, 45, 180),
    "orange": (240, 130, 20),
}
SHAPES = ("circle", "square", "triangle", "star")
MOVES = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
INSTANT = ("appear", "disappear", "turn")
SIZES = ((128, 128), (160, 120), (120, 160), (176, 144), (192, 108), (108, 192), (224, 126), (160, 96), (256, 192))
SAMPLED_FRAMES = 16
_EXTENT = {"circle": 1.0, "square": 0.86 * math.sqrt(2), "triangle": 1.3, "star": 1.3}  # outer radius / nominal radius
_LIMIT = 0.96


@dataclass(frozen=True)
class Step:
    """One action of an object between two times. `amount` is a distance (moves) or an angle in radians (rotate)."""

    action: str
    start: float
    end: float
    amount: float = 0.0


@dataclass(frozen=True)
class Thing:
    """One object: its start and its steps in order of time. An object without steps does not move."""

    shape: str
    colour: str
    colour_after: str | None
    radius: float
    x: float
    y: float
    angle: float
    steps: tuple[Step, ...]
    tint: tuple[int, int, int]

    @property
    def actions(self) -> tuple[str, ...]:
        """Names of the steps, or ("still",)."""
        return tuple(step.action for step in self.steps) or ("still",)

    @property
    def extent(self) -> float:
        """Radius of the circle that contains the object at every angle."""
        return self.radius * _EXTENT[self.shape]

    def state(self, time: float) -> tuple[float, float, float, bool, str]:
        """x, y, angle in radians, whether the object is visible, and its colour at `time`."""
        x = self.x
        y = self.y
        angle = self.angle
        visible = True
        colour = self.colour
        for step in self.steps:
            done = min(max((time - step.start) / max(step.end - step.start, 1e-6), 0.0), 1.0)
            if step.action in MOVES:
                x += MOVES[step.action][0] * step.amount * done
                y += MOVES[step.action][1] * step.amount * done
            elif step.action == "rotate":
                angle += step.amount * done
            elif step.action == "appear":
                visible = time >= step.start
            elif step.action == "disappear":
                visible = time < step.start
            elif step.action == "turn" and time >= step.start:
                colour = self.colour_after or colour
        return x, y, angle, visible, colour


@dataclass(frozen=True)
class Clip:
    """The specification of one clip. If `ordered`, things[0] acts before things[1], else all act at the same time."""

    seed: int
    things: tuple[Thing, ...]
    ordered: bool
    width: int
    height: int
    frames: int
    fps: int
    crf: int
    noise: float


def sample_indices(count: int, wanted: int = SAMPLED_FRAMES) -> list[int]:
    """Indices of the `wanted` frames that the demo of the published model takes from a video of `count` frames."""
    segment = (count - 1) / wanted
    return [int(segment / 2) + round(segment * i) for i in range(wanted)]


def _pick(rng: np.random.Generator, items: Sequence[T], weights: list[float] | None = None) -> T:
    p = None if weights is None else np.array(weights) / sum(weights)
    return items[int(rng.choice(len(items), p=p))]


def _actions(rng: np.random.Generator, shape: str, busy: bool, instant: bool) -> str:
    """The name of an action that `shape` can show. `busy` excludes "still", `instant` allows the INSTANT actions."""
    names = list(MOVES)
    weights = [3.0] * 4
    if shape != "circle":
        names = names + ["rotate"]
        weights = weights + [2.5]
    if not busy:
        names = names + ["still"]
        weights = weights + [2.5]
    if instant:
        names = names + list(INSTANT)
        weights = weights + [2.0, 2.0, 2.5]
    return _pick(rng, names, weights)


def _step(rng: np.random.Generator, action: str, slot: int | None) -> Step:
    """A step in the first (0) or second (1) half of the clip, or over most of it (None)."""
    if slot is None:
        start = rng.uniform(0.0, 0.18)
        end = rng.uniform(0.78, 1.0)
        moment = rng.uniform(0.35, 0.65)
        distance = rng.uniform(0.55, 1.15)
        turn = rng.uniform(3.0, 4.8)
    else:
        start = rng.uniform(0.03, 0.1) + 0.5 * slot
        end = rng.uniform(0.38, 0.46) + 0.5 * slot
        moment = rng.uniform(0.18, 0.34) + 0.48 * slot
        distance = rng.uniform(0.5, 0.85)
        turn = rng.uniform(1.6, 2.2)
    if action in INSTANT:
        return Step(action, moment, moment)
    if action == "rotate":
        return Step(action, start, end, turn * _pick(rng, (-1.0, 1.0)))
    return Step(action, start, end, distance)


def _thing(rng: np.random.Generator, shape: str, colours: list[str], steps: tuple[Step, ...], small: bool) -> Thing:
    """An object whose whole path lies inside the centre square. Removes the colours it takes from `colours`."""
    colour = colours.pop(0)
    after = colours.pop(0) if any(step.action == "turn" for step in steps) else None
    radius = rng.uniform(0.22, 0.3) if small else rng.uniform(0.24, 0.38)
    spins = any(step.action == "rotate" for step in steps)
    angle = rng.uniform(-math.pi, math.pi) if spins else rng.uniform(-0.2, 0.2)
    low = np.zeros(2)
    high = np.zeros(2)
    offset = np.zeros(2)
    for step in steps:
        if step.action in MOVES:
            offset = offset + np.array(MOVES[step.action]) * step.amount
            low = np.minimum(low, offset)
            high = np.maximum(high, offset)
    reach = _LIMIT - radius * _EXTENT[shape]
    x = rng.uniform(-reach - low[0], max(reach - high[0], -reach - low[0] + 1e-3))
    y = rng.uniform(-reach - low[1], max(reach - high[1], -reach - low[1] + 1e-3))
    jitter = rng.integers(-14, 15, size=3)
    tint = tuple(int(v) for v in jitter)
    return Thing(shape, colour, after, radius, float(x), float(y), float(angle), steps, tint)


def _apart(first: Thing, second: Thing) -> bool:
    """Whether two objects never touch."""
    for time in np.linspace(0.0, 1.0, 25):
        a = first.state(float(time))
        b = second.state(float(time))
        if math.hypot(a[0] - b[0], a[1] - b[1]) < first.extent + second.extent + 0.05:
            return False
    return True


def _one_thing(rng: np.random.Generator) -> tuple[Thing, ...]:
    shape = _pick(rng, SHAPES)
    colours = [str(name) for name in rng.permutation(list(COLOURS))]
    if rng.random() < 0.3:
        names: list[str] = []
        while len(names) < 2:
            name = _actions(rng, shape, busy=True, instant=False)
            if name not in names:
                names.append(name)
        steps = tuple(_step(rng, name, slot) for slot, name in enumerate(names))
    else:
        name = _actions(rng, shape, busy=False, instant=True)
        steps = () if name == "still" else (_step(rng, name, None),)
    return (_thing(rng, shape, colours, steps, small=False),)


def _two_things(rng: np.random.Generator, ordered: bool) -> tuple[Thing, ...]:
    while True:
        shapes = [_pick(rng, SHAPES), _pick(rng, SHAPES)]
        if shapes[0] == shapes[1] and rng.random() < 0.5:
            continue
        colours = [str(name) for name in rng.permutation(list(COLOURS))]
        names = [_actions(rng, shape, busy=ordered, instant=True) for shape in shapes]
        if not ordered and all(name in INSTANT for name in names):
            continue
        if not ordered and rng.random() < 0.08:
            names = ["still", "still"]
        steps = [() if name == "still" else (_step(rng, name, k if ordered else None),) for k, name in enumerate(names)]
        things = tuple(_thing(rng, shape, colours, step, small=True) for shape, step in zip(shapes, steps, strict=True))
        if _apart(*things):
            return things if ordered else tuple(sorted(things, key=lambda thing: list(COLOURS).index(thing.colour)))


def make_clip(seed: int) -> Clip:
    """The clip of a seed. The same seed gives the same clip everywhere."""
    rng = np.random.default_rng(seed)
    kind = rng.random()
    ordered = 0.55 <= kind < 0.78
    things = _one_thing(rng) if kind < 0.55 else _two_things(rng, ordered)
    width, height = _pick(rng, SIZES)
    frames = int(rng.integers(20, 65))
    fps = int(_pick(rng, (10, 12, 15, 24, 25, 30)))
    return Clip(seed, things, ordered, width, height, frames, fps, int(rng.integers(17, 27)), rng.uniform(0.0, 5.0))


def _background(clip: Clip, width: int, height: int) -> np.ndarray:
    """A plain colour, a linear gradient or soft noise of little saturation: float32 [height, width, 3], 0 to 255."""
    rng = np.random.default_rng([clip.seed, 1])

    def shade() -> np.ndarray:
        return np.clip(rng.uniform(5, 250) + rng.uniform(-22, 22, 3), 0, 255).astype(np.float32)

    kind = rng.random()
    if kind < 0.4:
        return np.broadcast_to(shade(), (height, width, 3)).copy()
    rows = np.linspace(0.0, 1.0, height, dtype=np.float32)[:, None]
    columns = np.linspace(0.0, 1.0, width, dtype=np.float32)[None]
    if kind < 0.7:
        first = shade()
        second = shade()
        weight = _pick(rng, (rows + 0 * columns, columns + 0 * rows, (rows + columns) / 2))[..., None]
        return first * (1 - weight) + second * weight
    size = int(rng.integers(4, 12))
    grid = shade() + rng.normal(0, rng.uniform(6, 20), (size, size, 3)).astype(np.float32)

    def blend(values: np.ndarray, axis: int, at: np.ndarray) -> np.ndarray:
        position = at.reshape(-1) * (size - 1)
        low = np.minimum(position.astype(int), size - 2)
        part = (position - low).reshape([-1 if k == axis else 1 for k in range(3)])
        return values.take(low, axis) * (1 - part) + values.take(low + 1, axis) * part

    return np.clip(blend(blend(grid, 0, rows), 1, columns), 0, 255).astype(np.float32)


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance to the outline, negative inside, in the units of x and y. The y axis runs down."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.86 * radius
    outer = 1.3 * radius
    if shape == "triangle":
        side = math.sqrt(0.75)
        return np.maximum(np.maximum(y, side * np.abs(x) - 0.5 * y) - outer / 2, -outer * 2)
    angle = np.abs((np.arctan2(x, -y) + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5)
    rho = np.hypot(x, y)
    inner = 0.45 * outer
    edge = np.array([inner * math.cos(math.pi / 5) - outer, inner * math.sin(math.pi / 5)])
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    return (rho * np.cos(angle) - outer) * normal[0] + rho * np.sin(angle) * normal[1]


def _draw(canvas: np.ndarray, thing: Thing, time: float, bare: bool = False) -> None:
    """Draws one object onto float32 [height, width, channels] in place, smooth at its edges. `bare` paints ones."""
    x, y, angle, visible, colour = thing.state(time)
    if not visible:
        return
    height, width = canvas.shape[:2]
    half = min(height, width) / 2
    centre_x = width / 2 + x * half
    centre_y = height / 2 + y * half
    reach = thing.extent * half + 2
    left = max(int(centre_x - reach), 0)
    right = min(int(centre_x + reach) + 1, width)
    top = max(int(centre_y - reach), 0)
    bottom = min(int(centre_y + reach) + 1, height)
    dx = (np.arange(left, right, dtype=np.float32) + 0.5 - centre_x)[None]
    dy = (np.arange(top, bottom, dtype=np.float32) + 0.5 - centre_y)[:, None]
    cos = math.cos(angle)
    sin = math.sin(angle)
    distance = _distance(thing.shape, cos * dx + sin * dy, cos * dy - sin * dx, thing.radius * half)
    alpha = np.clip(0.5 - distance, 0.0, 1.0)[..., None].astype(np.float32)
    paint = np.clip(np.array(COLOURS[colour]) + np.array(thing.tint), 0, 255).astype(np.float32)
    paint = np.ones(1, np.float32) if bare else paint
    region = canvas[top:bottom, left:right]
    region += alpha * (paint - region)


def render(
    clip: Clip, indices: list[int] | range | None = None, width: int | None = None, height: int | None = None
) -> np.ndarray:
    """Frames of a clip as uint8 [count, height, width, 3], not encoded. Without `indices` all frames are drawn."""
    indices = range(clip.frames) if indices is None else indices
    background = _background(clip, width or clip.width, height or clip.height)
    rng = np.random.default_rng([clip.seed, 2])
    noise = rng.normal(0, clip.noise, (2, *background.shape[:2], 1)).astype(np.float32)
    out = np.empty((len(indices), *background.shape), np.uint8)
    for row, index in enumerate(indices):
        canvas = background.copy()
        for thing in clip.things:
            _draw(canvas, thing, index / (clip.frames - 1))
        canvas += np.roll(noise[index % 2], int(index) * 7, axis=1)
        out[row] = np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
    return out


def coverage(clip: Clip, indices: list[int], size: int) -> np.ndarray:
    """How far objects cover each pixel of the centre square: float32 [count, size, size], 0 to 1."""
    out = np.zeros((len(indices), size, size, 1), np.float32)
    for canvas, index in zip(out, indices, strict=True):
        for thing in clip.things:
            _draw(canvas, thing, index / (clip.frames - 1), bare=True)
    return out[..., 0]


def write_video(path: str | Path, frames: np.ndarray, fps: int, crf: int = 20, x264_params: str = "") -> None:
    """Encodes uint8 [count, height, width, 3] as H.264. Height and width are even. The file name's ending says the
    container."""
    import av

    with av.open(str(path), "w") as container:
        options = {"crf": str(crf), "preset": "veryfast"} | ({"x264-params": x264_params} if x264_params else {})
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width = frames.shape[2]
        stream.height = frames.shape[1]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def describe(clip: Clip, video: str) -> dict:
    """The entry of clips.json for one clip."""
    from shape_questions import caption, facts, questions

    return {
        "seed": clip.seed,
        "video": video,
        "width": clip.width,
        "height": clip.height,
        "frames": clip.frames,
        "fps": clip.fps,
        "caption": caption(clip),
        "facts": facts(clip),
        "questions": [question.as_dict() for question in questions(clip)],
    }


def main() -> None:
    """Runs the command line, which the docstring of this file describes."""
    parser = Parser(
        prog="python examples/render_shapes.py",
        description="Render clips of moving shapes with captions and questions.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; made if missing")
    parser.add_argument("--count", type=int, default=200, help="number of clips")
    parser.add_argument("--seed", type=int, default=900000, help="seed of the first clip; the others follow")
    options = parser.parse_args()
    if options.count < 1:
        parser.error(f"--count {options.count}: must be at least 1")
    options.out.mkdir(parents=True, exist_ok=True)
    entries = []
    for seed in range(options.seed, options.seed + options.count):
        clip = make_clip(seed)
        name = f"clip_{seed}.mp4"
        write_video(options.out / name, render(clip), clip.fps, clip.crf)
        entries.append(describe(clip, name))
    (options.out / "clips.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    print(f"{len(entries)} clips in {options.out}")


if __name__ == "__main__":
    main()

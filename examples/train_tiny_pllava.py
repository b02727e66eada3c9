"""Trains examples/tiny_pllava from scratch on clips of render_shapes: about 80 minutes on two CPU cores with bfloat16.

    python examples/train_tiny_pllava.py --seed 1

Training has six phases, each of a fixed number of steps:

- vision: the vision tower alone learns colours, shapes and places, and which part of a patch objects cover. The tower
  does not change after this phase.
- answers: projector and decoder learn to answer, mostly on clips drawn at the model's size. Auxiliary heads, which are
  not part of the checkpoint, learn the object under a cell (colour, shape, place, motion) and the right option.
- hard: like answers, but most clips have two objects or two steps. Another head learns the answer at the end of a
  question's line.
- order: more heads learn what the objects of a clip have done so far.
- choice: most questions are multiple choice, which takes the longest to learn.
- lora: the strongest 128 directions of q_proj and v_proj become LoRA adapters, and the rest of the decoder is frozen.
  Adapters and projector learn on clips that went through H.264 and the resizes of inference.

The model is rounded to bfloat16, written in the published layout, and evaluated on held-out clips with transformers.
The report goes to stdout and progress to stderr. --work keeps encoded clips and the state after each phase.
--resume PHASE continues after that phase with fresh random numbers, so the result differs slightly.
"""

import argparse
import json
import math
import multiprocessing
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package need not be installed

from atb_pllava.doctor.required_packages import require_packages

if __name__ == "__main__":
    require_packages()

import numpy as np
import torch
import torch.nn.functional as F
from evaluate_tiny_pllava import evaluate
from render_shapes import COLOURS, SHAPES, coverage, make_clip, sample_indices
from shape_questions import SYSTEM
from tiny_data import (
    GREETINGS,
    MOTIONS,
    PLAIN_SYSTEMS,
    Cells,
    Rows,
    Writer,
    cells,
    clip_texts,
    coded_clip,
    corpus,
    drawn_clip,
    normalise,
    pack,
    states,
)
from tiny_export import LORA_ALPHA, LORA_RANK, export
from tiny_model import Pllava, Sizes
from tiny_tokenizer import build_tokenizer
from tokenizers import Tokenizer
from torch import Tensor, nn

from atb_pllava.cli import Parser

CODED_SEED = 500_000
DRAWN_SEED = 2_000_000
CHECK_SEED = 800_000
HELD_OUT_SEED = 900_000
CELL_FIELDS = ("colours", "shape", "places", "shift", "motion", "history", "frame")
HISTORY = (len(MOTIONS), len(MOTIONS), 2, len(COLOURS) + 1)  # classes of the parts of Cells.history
MASK = 7  # resolution at which a patch tells which part of it objects cover
AUX_CLASSES = len(COLOURS) + len(SHAPES) + 4


def log(text: str) -> None:
    """Prints a line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Stage:
    """A phase that trains on questions."""

    name: str
    steps: int
    rate: float  # highest learning rate
    warmup: int  # steps
    last: float  # share of the learning rate that is left at the end
    coded: float  # share of clips that went through H.264
    aux: tuple[float, float]  # weight of the auxiliary losses in the first 60 % of the steps and after them
    hard: bool = True  # few clips of one object with one step
    hints: bool = True  # auxiliary loss: the answer at the end of a question's line
    history: bool = False  # auxiliary loss: what objects have done so far
    focus: bool = False  # mostly multiple choice, fewer easy questions
    lora: bool = False


class Heads(nn.Module):
    """Auxiliary heads, which are not part of the checkpoint."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.patch = nn.Linear(s.vision_hidden, AUX_CLASSES)
        self.mask = nn.ModuleList(nn.Linear(s.vision_hidden, MASK * MASK) for _ in range(2))
        self.cell = nn.Linear(s.hidden, AUX_CLASSES)
        self.motion = nn.ModuleList(nn.Linear(s.hidden, len(MOTIONS) + 2) for _ in range(s.layers))
        self.option = nn.ModuleList(nn.Linear(s.hidden, 1) for _ in range(s.layers))
        self.history = nn.ModuleList(nn.Linear(s.hidden, sum(HISTORY) + 2 * len(COLOURS) + 1) for _ in range(s.layers))
        self.hint = nn.ModuleList(nn.Linear(s.hidden, s.vocab) for _ in range(s.layers))


def cell_loss(out: Tensor, truth: Cells) -> Tensor:
    """Loss of colour, shape and place of the object under each cell. `out` is [clips * frames * cells, AUX_CLASSES]."""
    out = out.float()
    n = len(COLOURS)
    shapes = len(SHAPES)
    colours = truth.colours.flatten(0, -2)
    shape = truth.shape.flatten()
    places = truth.places.flatten(0, -2)
    some = shape > 0
    loss = F.binary_cross_entropy_with_logits(out[:, :n], colours) * n
    loss = loss + F.cross_entropy(out[some, n : n + shapes], shape[some] - 1)
    return loss + 2 * F.mse_loss(out[:, n + shapes :][some], places[some])


def history_loss(out: Tensor, truth: Cells) -> Tensor:
    """Loss of what objects have done so far. `out` is [clips * frames * cells, ...]."""
    parts = out.float().split((*HISTORY, 2 * len(COLOURS), 1), 1)
    history = truth.history.flatten(0, -2)
    frame = truth.frame.flatten(0, -2)
    loss = sum(F.cross_entropy(part, history[:, k]) for k, part in enumerate(parts[: len(HISTORY)]))
    loss = loss + 3 * F.binary_cross_entropy_with_logits(parts[-2], frame[:, :-1])
    return loss + F.mse_loss(parts[-1][:, 0], frame[:, -1])


def stacked(parts: list[Cells]) -> Cells:
    """The targets of several clips as one, with a first dimension for clips."""
    return Cells(*(torch.stack([getattr(p, name) for p in parts]) for name in CELL_FIELDS))


class Optimiser:
    """Muon for the matrices of the layers and AdamW for the other parameters, with one learning-rate schedule."""

    def __init__(
        self, modules: list[nn.Module], steps: int, rate: float, warmup: int, last: float = 0.02, muon: bool = True
    ) -> None:
        named = [(name, p) for m in modules for name, p in m.named_parameters() if p.requires_grad]
        layered = [p for name, p in named if muon and p.dim() == 2 and "layers" in name]
        chosen = {id(p) for p in layered}
        rest = [p for _, p in named if id(p) not in chosen]
        self.parameters = [p for _, p in named]
        self.parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.01)]
        if layered:
            self.parts.append(torch.optim.Muon(layered, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
        self.steps = steps
        self.rate = rate
        self.warmup = warmup
        self.last = last
        self.step_number = 0

    def step(self) -> None:
        """Updates the parameters. The learning rate rises linearly, then falls linearly to `last` times its peak."""
        done = (self.step_number - self.warmup) / max(self.steps - self.warmup, 1)
        rate = self.rate * min((self.step_number + 1) / self.warmup, 1 - done * (1 - self.last))
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad(set_to_none=True)
        self.step_number += 1


class Trainer:
    """The model, the data and the random state, which all phases share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        torch.manual_seed(options.seed)
        self.rng = random.Random(options.seed)
        self.noise = np.random.default_rng(options.seed)
        self.tokenizer_data, self.image = build_tokenizer(corpus(400), 700)
        self.sizes = Sizes(vocab=64 * math.ceil((self.image + 2) / 64))
        options.work.mkdir(parents=True, exist_ok=True)
        path = options.work / "tokenizer.json"
        path.write_text(json.dumps(self.tokenizer_data, ensure_ascii=False), encoding="utf-8")
        self.writer = Writer(Tokenizer.from_file(str(path)))
        self.model = Pllava(self.sizes)
        self.heads = Heads(self.sizes)
        self.model.initialise()
        self.next_seed = DRAWN_SEED + options.seed * 1_000_000
        self.coded: np.ndarray | None = None
        self.began = time.time()

    def prepare_coded(self) -> None:
        """Encodes and decodes the clips that go through H.264, or reads them from the work folder."""
        path = self.options.work / f"coded_{self.options.coded}.npy"
        count = self.options.coded
        if not path.exists():
            log(f"encoding {count} clips")
            with multiprocessing.get_context("spawn").Pool(2) as pool:
                frames = pool.imap(coded_clip, range(CODED_SEED, CODED_SEED + count), chunksize=16)
                store = np.lib.format.open_memmap(
                    path.with_suffix(".part"), "w+", np.uint8, (count, self.sizes.frames, 112, 112, 3)
                )
                for row, clip in enumerate(frames):
                    store[row] = clip
            store.flush()
            path.with_suffix(".part").rename(path)
        self.coded = np.load(path, mmap_mode="r")

    def clips(self, count: int, coded_share: float, hard: bool) -> tuple[list, np.ndarray]:
        """Specifications and frames of a batch. `hard` leaves out most clips of one object with one step."""
        specs = []
        frames = []
        while len(specs) < count:
            coded = self.rng.random() < coded_share
            row = self.rng.randrange(len(self.coded))
            clip = make_clip(CODED_SEED + row if coded else self.next_seed)
            self.next_seed += not coded
            if hard and len(clip.things) == 1 and len(clip.things[0].actions) == 1 and self.rng.random() < 0.75:
                continue
            specs.append(clip)
            frames.append(self.coded[row] if coded else drawn_clip(clip, self.sizes.image, self.noise))
        return specs, np.stack(frames)

    def vision_step(self, batch: int, picks: int = 4) -> tuple[Tensor, float]:
        """Loss of the vision phase on `picks` frames a clip, and the share of object patches with the right shape."""
        size = self.sizes.image
        grid = self.sizes.grid
        frames = []
        masks = []
        truth = []
        for _ in range(batch):
            clip = make_clip(self.next_seed)
            pick = sorted(self.rng.sample(range(self.sizes.frames), picks))
            self.next_seed += 1
            indices = [sample_indices(clip.frames)[k] for k in pick]
            frames.append(drawn_clip(clip, size, self.noise, indices))
            masks.append(coverage(clip, indices, MASK * grid))
            truth.append(cells(torch.from_numpy(states(clip)[pick]), grid))
        target = truth_flat(stacked(truth))
        early = []
        mask = torch.from_numpy(np.stack(masks)).flatten(0, 1).unflatten(2, (grid, MASK)).unflatten(1, (grid, MASK))
        mask = mask.permute(0, 1, 3, 2, 4).flatten(3).flatten(0, 2)
        with torch.autocast("cpu", torch.bfloat16):
            features = self.model.vision_tower.vision_model(normalise(np.stack(frames)).flatten(0, 1), early)
            out = self.heads.patch(features).flatten(0, 1)
            loss = cell_loss(out, target)
            some = target.shape.flatten() > 0
            for layer, head in enumerate(self.heads.mask):
                guess = head(early[layer].flatten(0, 1)[some]).float()
                loss = loss + 2 * F.binary_cross_entropy_with_logits(guess, mask[some])
        told = out[:, len(COLOURS) : len(COLOURS) + len(SHAPES)].argmax(-1) + 1
        return loss, float((told == target.shape.flatten())[some].float().mean())

    def rows(self, specs: list, kind: str, focus: bool) -> Rows:
        """Packed questions for a batch. All prompts are of the `kind` that clip_texts takes."""
        texts = [clip_texts(self.writer, clip, self.rng, kind, self.options.room, focus) for clip in specs]
        head = self.writer.encode(head_text(kind))
        return pack(head[: head.index(self.image)], self.sizes.video_tokens, texts)

    def answer_step(self, stage: Stage, aux: float) -> tuple[Tensor, dict[str, float]]:
        """Loss of the later phases on one batch, and its parts by name. `aux` is the weight of the auxiliary losses."""
        specs, frames = self.clips(self.options.batch, stage.coded, stage.hard)
        kind = (
            "mvbench"
            if self.rng.random() < (0.4 if stage.focus else 0.25)
            else self.rng.choices(PLAIN_SYSTEMS, (8, 1, 1))[0]
        )
        rows = self.rows(specs, kind, stage.focus)
        with torch.autocast("cpu", torch.bfloat16):
            video_embeds = self.model.encode_video(normalise(frames))
            prefix, asked = run(self.model, rows, video_embeds)
            loss = answer_loss(self.model, asked[-1], rows)
            parts = {"answer": float(loss.detach())}
            if aux:
                extra = self.auxiliary(specs, video_embeds, prefix, asked, rows, stage)
                parts |= {name: float(value.detach()) for name, value in extra.items()}
                loss = loss + aux * sum(extra.values())
        return loss, parts

    def auxiliary(
        self, specs: list, video_embeds: Tensor, prefix: list[Tensor], asked: list[Tensor], rows: Rows, stage: Stage
    ) -> dict[str, Tensor]:
        """The auxiliary losses by name, of all phases between vision and lora."""
        state = [torch.from_numpy(states(clip)) for clip in specs]
        coarse = stacked([cells(s, 4) for s in state])
        out = {"cell": 0.5 * cell_loss(self.heads.cell(video_embeds).flatten(0, 1), truth_flat(coarse))}
        start = len(rows.prefix)
        options = rows.options.flatten() >= 0
        truth = rows.options.flatten()[options].float()
        for layer in range(1, len(prefix) - 1):
            guess = self.heads.motion[layer](prefix[layer][:, start:]).flatten(0, 1).float()
            motion = coarse.motion.flatten()
            out[f"motion{layer}"] = F.cross_entropy(guess[:, :-2], motion)
            out[f"shift{layer}"] = F.mse_loss(guess[motion >= 0, -2:], coarse.shift.flatten(0, -2)[motion >= 0])
            if stage.history:
                out[f"history{layer}"] = 0.5 * history_loss(
                    self.heads.history[layer](prefix[layer][:, start:]).flatten(0, 1), coarse
                )
        for layer in range(2, len(asked)):
            mark = self.heads.option[layer](asked[layer]).flatten()[options].float()
            out[f"option{layer}"] = F.binary_cross_entropy_with_logits(mark, truth)
        if stage.hints and rows.hints:
            row = torch.tensor([hint[0] for hint in rows.hints])
            place = torch.tensor([hint[1] for hint in rows.hints])
            words = torch.zeros(len(row), self.sizes.vocab)
            for k, (_, _, tokens) in enumerate(rows.hints):
                words[k, tokens] = 1 / len(set(tokens))
            for layer in range(1, len(asked) - 1):
                guess = self.heads.hint[layer](asked[layer][row, place]).float()
                out[f"hint{layer}"] = 0.3 * F.cross_entropy(guess, words)
        return out

    def greeting_step(self) -> Tensor:
        """Loss of prompts without a video."""
        texts = [self.writer.text([(f"USER: {ask} ASSISTANT:", " " + answer)], "text") for ask, answer in GREETINGS]
        rows = pack([1], 0, [texts])
        with torch.autocast("cpu", torch.bfloat16):
            _, asked = run(self.model, rows, torch.zeros(1, 0, self.sizes.hidden))
            return 0.3 * answer_loss(self.model, asked[-1], rows)

    @torch.no_grad()
    def check(self, clips: int = 96) -> str:
        """Percentage of questions whose greedy answer is exactly right, by kind, as a line of text.

        The clips went through H.264 and are not used in training.
        """
        right: dict[str, list[int]] = {}
        rng = random.Random(5)
        for start in range(0, clips, 8):
            kind = "mvbench" if start % 16 else ""
            seeds = range(CHECK_SEED + start, CHECK_SEED + start + 8)
            specs = [make_clip(seed) for seed in seeds]
            frames = np.stack([coded_clip(seed) for seed in seeds])
            texts = [clip_texts(self.writer, clip, rng, kind, 600) for clip in specs]
            head = self.writer.encode(head_text(kind))
            rows = pack(head[: head.index(self.image)], self.sizes.video_tokens, texts)
            with torch.autocast("cpu", torch.bfloat16):
                _, asked = run(self.model, rows, self.model.encode_video(normalise(frames)))
                best = self.model.logits(asked[-1]).argmax(-1)
            good = (best == rows.target) | (rows.target == -100)
            for b, spans in enumerate(rows.spans):
                for task, begin, end in spans:
                    right.setdefault(task, []).append(int(good[b, begin:end].all()))
        choice = [v for task, values in right.items() if task.startswith("mc_") for v in values]
        each = " ".join(f"{task} {100 * np.mean(v):.0f}" for task, v in sorted(right.items()))
        return f"choice {100 * np.mean(choice):.1f} | {each}"

    def save(self, name: str) -> None:
        """Saves the state in the work folder."""
        state = {"model": self.model.state_dict(), "heads": self.heads.state_dict(), "next_seed": self.next_seed}
        torch.save(state, self.options.work / f"{name}.pt")

    def train_vision(self) -> None:
        """Runs the phase vision."""
        steps = self.options.vision_steps
        optimiser = Optimiser([self.model.vision_tower, self.heads.patch, self.heads.mask], steps, 3e-3, 30)
        clock = Clock("vision", steps)
        means = np.zeros(2)
        for step in range(steps):
            loss, shapes = self.vision_step(16)
            loss.backward()
            optimiser.step()
            means += (np.array([float(loss.detach()), shapes]) - means) / min(step + 1, 40)
            if step % 40 == 39:
                clock.tell(step + 1, f"loss {means[0]:.3f} shapes {100 * means[1]:.1f} %")
            if step % 100 == 99:
                self.save("vision")

    def train_answers(self, stage: Stage) -> None:
        """Runs any later phase."""
        if stage.lora:
            self.model.add_lora(LORA_RANK, LORA_ALPHA / LORA_RANK)
        self.model.vision_tower.requires_grad_(False)
        learning = [self.model] if stage.lora else [self.model, self.heads]
        optimiser = Optimiser(learning, stage.steps, stage.rate, stage.warmup, stage.last, muon=not stage.lora)
        clock = Clock(stage.name, stage.steps)
        means = {}
        for step in range(stage.steps):
            aux = stage.aux[0] if step < 0.6 * stage.steps else stage.aux[1]
            loss, parts = self.answer_step(stage, aux)
            if step % 16 == 15:
                loss = loss + self.greeting_step()
            loss.backward()
            optimiser.step()
            for name, value in parts.items():
                means[name] = means.get(name, value) * 0.96 + value * 0.04
            if step % 25 == 24:
                clock.tell(step + 1, " ".join(f"{name} {value:.3f}" for name, value in means.items()))
            if step % self.options.check_every == self.options.check_every - 1:
                log("check: " + self.check())
                self.save(stage.name)


class Clock:
    """Logs progress with the time that is left."""

    def __init__(self, name: str, steps: int) -> None:
        self.name = name
        self.steps = steps
        self.start = time.time()

    def tell(self, step: int, text: str) -> None:
        spent = time.time() - self.start
        left = spent / step * (self.steps - step)
        log(f"{self.name} {step}/{self.steps} {spent:.0f} s, {left / 60:.1f} min left: {text}")


def head_text(kind: str) -> str:
    """The prompt up to <image>."""
    return f"{SYSTEM} USER: <image>" if kind == "mvbench" else f"{kind}USER:<image>"


def truth_flat(truth: Cells) -> Cells:
    """The targets with one dimension for clips and frames."""
    return Cells(*(getattr(truth, name).flatten(0, 1) for name in CELL_FIELDS))


def run(model: Pllava, rows: Rows, video_embeds: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states of prefix and questions after every layer."""
    head = model.embed(torch.tensor(rows.prefix)).expand(len(video_embeds), -1, -1)
    prefix = torch.cat([head, video_embeds], 1)
    return model.language_model(prefix, model.embed(rows.ids), rows.places, rows.mask)


def answer_loss(model: Pllava, hidden: Tensor, rows: Rows) -> Tensor:
    """Weighted cross entropy of the answer tokens."""
    some = rows.target >= 0
    each = F.cross_entropy(model.logits(hidden[some]).float(), rows.target[some], reduction="none")
    return (each * rows.weight[some]).sum() / rows.weight[some].sum()


def main() -> None:
    """Runs the command line, which the docstring of this file describes."""
    here = Path(__file__).resolve().parent
    parser = Parser(prog="python examples/train_tiny_pllava.py", description="Train the tiny PLLaVA checkpoint.")
    parser.add_argument("--out", type=Path, default=here / "tiny_pllava", help="folder of the checkpoint")
    work = Path(tempfile.gettempdir()) / "tiny_pllava_training"
    parser.add_argument("--work", type=Path, default=work, help=f"folder for clips and states in between: {work}")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--vision-steps", type=int, default=1400)
    parser.add_argument("--steps", type=int, default=1500, help="steps of the main phase")
    parser.add_argument("--lora-steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="clips per step")
    parser.add_argument("--hard-steps", type=int, default=750, help="steps of the phase with mostly hard clips")
    parser.add_argument("--order-steps", type=int, default=1200, help="steps of the phase that adds what was before")
    parser.add_argument("--choice-steps", type=int, default=700, help="steps of the phase with most multiple choice")
    parser.add_argument("--lora-rate", type=float, default=5e-4)
    parser.add_argument("--coded", type=int, default=1600, help="clips that go through H.264")
    parser.add_argument("--room", type=int, default=200, help="tokens of questions per clip")
    parser.add_argument("--check-every", type=int, default=250, help="steps between checks")
    parser.add_argument("--evaluate", type=int, default=200, help="held-out clips for the evaluation at the end")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--resume", choices=("vision", "answers", "hard", "order", "choice", "lora"), help="continue after this phase"
    )
    options = parser.parse_args()
    require_packages("transformers")  # the evaluation at the end; --help does without
    from tiny_reference import reference

    state_file = options.work / f"{options.resume}.pt"
    if options.resume and not state_file.is_file():
        parser.error(f"--resume {options.resume}: {state_file} does not exist; leave --resume out or give its --work")
    torch.set_num_threads(options.threads)
    trainer = Trainer(options)
    trainer.prepare_coded()
    stages = (
        Stage("answers", options.steps, 3e-3, 100, 1 / 3, 0.25, (1.0, 0.4), hard=False, hints=False),
        Stage("hard", options.hard_steps, 1.5e-3, 30, 1 / 3, 0.4, (0.4, 0.2)),
        Stage("order", options.order_steps, 2e-3, 60, 0.02, 0.4, (0.5, 0.3), history=True),
        Stage("choice", options.choice_steps, 1.2e-3, 30, 0.02, 0.4, (0.4, 0.2), history=True, focus=True),
        Stage("lora", options.lora_steps, options.lora_rate, 30, 0.02, 1.0, (0.0, 0.0), focus=True, lora=True),
    )
    phases = {"vision": trainer.train_vision}
    phases |= {stage.name: partial(trainer.train_answers, stage) for stage in stages}
    names = list(phases)
    if options.resume:
        state = torch.load(state_file, weights_only=True)
        if options.resume == "lora":
            trainer.model.add_lora(LORA_RANK, LORA_ALPHA / LORA_RANK)
        trainer.model.load_state_dict(state["model"])
        trainer.heads.load_state_dict(state["heads"])
        trainer.next_seed = state["next_seed"]
        names = names[names.index(options.resume) + 1 :]
    for name in names:
        phases[name]()
        trainer.save(name)
    export(trainer.model, trainer.tokenizer_data, trainer.image, options.out)
    log(f"wrote {options.out} after {(time.time() - trainer.began) / 60:.1f} min; evaluating with transformers")
    print(json.dumps(evaluate(reference(options.out), options.evaluate, HELD_OUT_SEED), indent=1))


if __name__ == "__main__":
    main()

"""Captions, facts, questions and prompts for clips of render_shapes, and a scorer of captions.

Facts are {"count": int, "ordered": bool, "objects": [{"colour", "shape", "actions": [...], "turns": colour or None}]}.
If "ordered" is true, the objects act in the order of the list.
"""

import re
from dataclasses import dataclass

import numpy as np
from render_shapes import COLOURS, MOVES, SHAPES, Clip

SYSTEM = (
    "Watch the video carefully, pay attention to the order of events and to the way objects and people move, "
    "then select the best option that answers the question.\n"
)
LETTERS = "ABCD"
DIRECTIONS = {"left": "to the left", "right": "to the right", "up": "up", "down": "down"}
CAPTION_REQUESTS = (
    "Describe the video.",
    "Describe this video.",
    "Describe the video in detail.",
    "Describe the video in details.",
    "Please describe the video.",
    "Please describe the video in detail.",
    "What happens in the video?",
    "What happens in this video?",
    "What is happening in the video?",
    "What is happening in this video?",
    "What happens?",
    "What do you see?",
    "What can you see in the video?",
    "What does the video show?",
    "Give a short description of the video.",
    "Summarize the video.",
    "Tell me what happens in the video.",
    "Can you describe the video?",
    "Describe what happens.",
    "Describe the image.",
)
NUMBERS = ("one", "two", "three", "four")
_ACTIONS = (*MOVES, "rotate", "appear", "disappear", "still")
_PHRASES = {name: f"moves {text}" for name, text in DIRECTIONS.items()} | {
    "rotate": "rotates",
    "appear": "appears",
    "disappear": "disappears",
    "still": "does not move",
}


@dataclass(frozen=True)
class Question:
    """An open question with its answer, and the same question as multiple choice.

    `correct` is the index of the right one of the `options`.
    """

    task: str
    question: str
    answer: str
    options: tuple[str, ...]
    correct: int

    def as_dict(self) -> dict:
        """The form stored in clips.json."""
        return {
            "task": self.task,
            "question": self.question,
            "answer": self.answer,
            "options": list(self.options),
            "correct": self.correct,
        }

    def choice_text(self) -> str:
        """Question and options as the MVBench evaluation writes them."""
        lines = "".join(f"({LETTERS[k]}) {text}\n" for k, text in enumerate(self.options))
        return f"Question: {self.question}\nOptions:\n{lines}Only give the best option."


def plain_prompt(question: str) -> str:
    """The prompt of the plain template for one question about one video."""
    return f"USER:<image> {question} ASSISTANT:"


def choice_prompt(question: Question, mvbench: bool = True) -> str:
    """The multiple-choice prompt. The model continues with `B) text` (MVBench form) or ` (B) text` (plain form)."""
    if mvbench:
        return f"{SYSTEM} USER: <image>\n USER: {question.choice_text()} ASSISTANT:Best option:("
    return plain_prompt(question.choice_text())


def chosen_letter(text: str) -> str | None:
    """The letter that an answer to a multiple-choice question names. None when the answer names no letter."""
    match = re.match(r"\s*\(?([A-D])\)", text)
    return match.group(1) if match else None


def phrase(action: str, turns: str | None = None) -> str:
    """An action as a verb phrase in the third person."""
    return f"turns {turns}" if action == "turn" else _PHRASES[action]


def facts(clip: Clip) -> dict:
    """The facts of a clip, in the form that the docstring of this file describes."""
    objects = [
        {"colour": t.colour, "shape": t.shape, "actions": list(t.actions), "turns": t.colour_after} for t in clip.things
    ]
    return {"count": len(objects), "ordered": clip.ordered, "objects": objects}


def _clause(thing: dict) -> str:
    article = "an" if thing["colour"] == "orange" else "a"
    acts = " and then ".join(phrase(action, thing["turns"]) for action in thing["actions"])
    return f"{article} {thing['colour']} {thing['shape']} {acts}"


def caption(clip: Clip) -> str:
    """One sentence that states every fact of the clip."""
    clauses = [_clause(thing) for thing in facts(clip)["objects"]]
    if clip.ordered:
        return f"First {clauses[0]}, then {clauses[1]}."
    text = " and ".join(clauses)
    return text[0].upper() + text[1:] + "."


_CLAUSE = re.compile(
    r"\ban? (?P<colour>\w+) (?P<shape>\w+) (?P<acts>.+?)(?=(?: and an? \w+ \w+ |, then an? |\.|$))", re.IGNORECASE
)


def parse_caption(text: str) -> dict:
    """The facts that a caption states. Objects that cannot be parsed are left out."""
    verbs = {value: key for key, value in _PHRASES.items()}
    objects = []
    for match in _CLAUSE.finditer(text.strip()):
        actions = []
        turns = None
        for part in match["acts"].split(" and then "):
            changed = re.fullmatch(r"turns (\w+)", part)
            turns = changed.group(1) if changed else turns
            actions.append("turn" if changed else verbs.get(part, part))
        objects.append(
            {"colour": match["colour"].lower(), "shape": match["shape"].lower(), "actions": actions, "turns": turns}
        )
    return {"count": len(objects), "ordered": text.strip().startswith("First "), "objects": objects}


def score_caption(text: str, truth: dict) -> dict[str, tuple[int, int]]:
    """(right, asked) for each kind of fact: count, colour, shape, action and order.

    Objects are matched by colour when the caption names an object of that colour, else by place in the sentence.
    "action" is right when all steps of an object are stated in their order. "order" is asked for every clip of two
    objects. It is right when the caption says "first, then" exactly if the clip is ordered, with the objects in the
    right order.
    """
    stated = parse_caption(text)
    score = {"count": (int(stated["count"] == truth["count"]), 1)}
    right = {"colour": 0, "shape": 0, "action": 0}
    by_colour = {thing["colour"]: thing for thing in stated["objects"]}
    for place, thing in enumerate(truth["objects"]):
        other = by_colour.get(thing["colour"])
        if other is None:
            other = stated["objects"][place] if place < stated["count"] else {}
        right["colour"] += other.get("colour") == thing["colour"]
        right["shape"] += other.get("shape") == thing["shape"]
        right["action"] += (other.get("actions"), other.get("turns")) == (thing["actions"], thing["turns"])
    score |= {kind: (value, truth["count"]) for kind, value in right.items()}
    if truth["count"] > 1:
        same = [t["colour"] for t in stated["objects"]] == [t["colour"] for t in truth["objects"]]
        score["order"] = (int(stated["ordered"] == truth["ordered"] and (same or not truth["ordered"])), 1)
    return score


class _Writer:
    """Collects the questions of one clip. One random generator makes all random choices."""

    def __init__(self, clip: Clip, rng: np.random.Generator) -> None:
        self.rng = rng
        self.facts = facts(clip)
        self.out: list[Question] = []

    def pick(self, *items: str) -> str:
        return items[int(self.rng.integers(len(items)))]

    def pick_thing(self, *things: dict) -> dict:
        return things[int(self.rng.integers(len(things)))]

    def add(self, task: str, question: str, answer: str, right: str, wrong: list[str]) -> None:
        """Adds a question. Its shuffled options are `right` and the first three different texts of `wrong`."""
        options = [right, *list(dict.fromkeys(text for text in wrong if text != right))[:3]]
        order = [int(k) for k in self.rng.permutation(len(options))]
        choices = tuple(options[k] for k in order)
        self.out.append(Question(task, question, answer, choices, order.index(0)))

    def yes_no(self, question: str, truth: bool) -> None:
        """Adds a question whose options are yes and no."""
        word = "yes" if truth else "no"
        self.add("yes_no", question, f"{word.capitalize()}.", word, ["no" if truth else "yes"])

    def shuffled(self, items: list[str] | tuple[str, ...]) -> list[str]:
        return [items[int(k)] for k in self.rng.permutation(len(items))]

    def name(self, thing: dict) -> str:
        """A name of one object that fits no other object of the clip."""
        others = [other for other in self.facts["objects"] if other is not thing]
        names = [f"the {thing['colour']} {thing['shape']}"] * 3 + [f"the {thing['colour']} object"]
        if all(other["shape"] != thing["shape"] for other in others):
            names += [f"the {thing['shape']}"] * 2
        if not others:
            names += ["the object"]
        return self.pick(*names)


def _appearance(w: _Writer, thing: dict) -> None:
    others = [other for other in w.facts["objects"] if other is not thing]
    colours = [o["colour"] for o in others] + [t for o in w.facts["objects"] for t in [o["turns"]] if t]
    if all(other["shape"] != thing["shape"] for other in others) and thing["turns"] is None:
        name = w.pick(f"the {thing['shape']}", *([] if others else ["the object"]))
        ask = w.pick(
            f"What colour is {name}?",
            f"What color is {name}?",
            f"What is the color of {name}?",
            f"What is the colour of {name}?",
            f"Which color does {name} have?",
        )
        wrong = [*colours, *w.shuffled(tuple(COLOURS))]
        w.add("colour", ask, f"{name.capitalize()} is {thing['colour']}.", thing["colour"], wrong)
    name = w.pick(f"the {thing['colour']} object", *([] if others else ["the object"]))
    ask = w.pick(f"What shape is {name}?", f"What is the shape of {name}?", f"Which shape does {name} have?")
    w.add("shape", ask, f"It is a {thing['shape']}.", thing["shape"], w.shuffled(SHAPES))
    if thing["turns"]:
        name = w.name(thing)
        ask = w.pick(
            f"What colour does {name} turn?",
            f"What color does {name} turn into?",
            f"Which color does {name} turn?",
            f"What is the color of {name} at the end?",
        )
        wrong = [thing["colour"], *w.shuffled(tuple(COLOURS))]
        w.add("colour_change", ask, f"It turns {thing['turns']}.", thing["turns"], wrong)


def _movement(w: _Writer, thing: dict) -> None:
    name = w.name(thing)
    actions = thing["actions"]
    if len(actions) == 1 and actions[0] in MOVES:
        ask = w.pick(
            f"In which direction does {name} move?",
            f"Which direction does {name} move in?",
            f"Where does {name} move?",
            f"Which way does {name} move?",
        )
        text = DIRECTIONS[actions[0]]
        w.add("direction", ask, f"It moves {text}.", text, w.shuffled(tuple(DIRECTIONS.values())))
    if len(actions) == 1:
        ask = w.pick(f"What does {name} do?", f"What happens to {name}?", f"What is {name} doing?")
        right = f"it {phrase(actions[0], thing['turns'])}"
        others = [f"it {phrase(a, o['turns'])}" for o in w.facts["objects"] for a in o["actions"]]
        turn = f"it turns {w.pick(*[c for c in COLOURS if c not in (thing['colour'], thing['turns'])])}"
        wrong = [*w.shuffled(others), *w.shuffled([f"it {phrase(a)}" for a in _ACTIONS] + [turn])]
        w.add("action", ask, f"{right[0].upper()}{right[1:]}.", right, wrong)
        return
    first = f"it {phrase(actions[0])}"
    second = f"it {phrase(actions[1])}"
    wrong = w.shuffled([f"it {phrase(action)}" for action in _ACTIONS if action not in ("appear", "disappear")])
    ask = w.pick(f"What does {name} do first?", f"What does {name} do at the beginning?")
    w.add("order", ask, f"{first.capitalize()}.", first, [second, *wrong])
    ask = w.pick(f"What does {name} do at the end?", f"What does {name} do last?", f"What does {name} do then?")
    w.add("order", ask, f"{second.capitalize()}.", second, [first, *wrong])
    pair = [phrase(action) for action in actions]
    third = w.pick(*[phrase(a) for a in (*MOVES, "rotate") if a not in actions])
    wrong = [" and then ".join(p) for p in ((pair[1], pair[0]), (pair[0], third), (third, pair[1]))]
    ask = w.pick(f"What does {name} do?", f"What happens to {name}?")
    text = " and then ".join(pair)
    w.add("order", ask, f"It {text}.", f"it {text}", [f"it {p}" for p in wrong])


def _events(w: _Writer) -> None:
    """Questions about two objects that act one after the other."""
    first, second = w.facts["objects"]

    def event(thing: dict, action: str | None = None) -> str:
        act = phrase(action) if action else phrase(thing["actions"][0], thing["turns"])
        return f"the {thing['colour']} {thing['shape']} {act}"

    names = [f"the {t['colour']} {t['shape']}" for t in (first, second)]
    for place, (thing, other) in enumerate(((first, second), (second, first))):
        word = ("first", w.pick("last", "then", "at the end"))[place]
        others = [event(w.pick_thing(first, second), a) for a in w.shuffled(_ACTIONS) if a not in thing["actions"]]
        right = event(thing)
        w.add("order", f"What happens {word}?", f"{right.capitalize()}.", right, [event(other), *others])
    place = int(w.rng.integers(2))
    ask = w.pick("Which object acts {}?", "Which object changes or moves {}?").format(("first", "last")[place])
    colours = [c for c in w.shuffled(tuple(COLOURS)) if c not in (first["colour"], second["colour"])]
    wrong = [names[1 - place], *(f"the {c} {w.pick(*SHAPES)}" for c in colours)]
    w.add("order", ask, f"{names[place].capitalize()}.", names[place], wrong)


def _checks(w: _Writer) -> None:
    """Yes/no questions. About half of the answers are no."""
    thing = w.pick_thing(*w.facts["objects"])
    present = {(t["colour"], t["shape"]) for t in w.facts["objects"]}
    truth = bool(w.rng.integers(2))
    colour = thing["colour"]
    shape = thing["shape"]
    if not truth:
        used = [c for t in w.facts["objects"] for c in (t["colour"], t["turns"])]
        if w.rng.random() < 0.5:
            colour = w.pick(*[c for c in COLOURS if c not in used])
        else:
            shape = w.pick(*[s for s in SHAPES if (colour, s) not in present])
    article = "an" if colour == "orange" else "a"
    w.yes_no(
        w.pick(f"Is there {article} {colour} {shape} in the video?", f"Is there {article} {colour} {shape}?"), truth
    )
    thing = w.pick_thing(*w.facts["objects"])
    truth = bool(w.rng.integers(2))
    name = w.name(thing)
    if len(thing["actions"]) == 1:
        action = thing["actions"][0]
        if not truth:
            action = w.pick(*[a for a in _ACTIONS if a != action])
        verb = {"rotate": "rotate", "appear": "appear", "disappear": "disappear", "still": "stay still"}.get(action)
        verb = verb or (f"turn {thing['turns']}" if action == "turn" else f"move {DIRECTIONS[action]}")
        w.yes_no(f"Does {name} {verb}?", truth)
    if w.facts["ordered"]:
        names = [f"the {t['colour']} {t['shape']}" for t in w.facts["objects"]]
        truth = bool(w.rng.integers(2))
        a, b = names if truth else names[::-1]
        w.yes_no(f"Does {a} act before {b}?", truth)


def questions(clip: Clip, seed: int | None = None) -> list[Question]:
    """All questions of a clip. `seed`, by default the clip's, decides wording, wrong options and order of options."""
    w = _Writer(clip, np.random.default_rng([clip.seed if seed is None else seed, 3]))
    for thing in w.facts["objects"]:
        _appearance(w, thing)
        _movement(w, thing)
    count = w.facts["count"]
    word = NUMBERS[w.facts["count"] - 1]
    ask = w.pick("How many objects are there?", "How many shapes are there?", "How many objects are in the video?")
    answer = "There is one object." if count == 1 else f"There are {word} objects."
    w.add("count", ask, answer, word, list(NUMBERS))
    if w.facts["ordered"]:
        _events(w)
    _checks(w)
    return w.out

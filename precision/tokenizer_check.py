"""Check that prompts have the original's ids and that ids have the original's text, with LLaMA's real vocabulary.

    python precision/tokenizer_check.py
    python precision/tokenizer_check.py --package llama-tokenizer-js-1.2.2.tgz --python REFERENCE/bin/python

The vocabulary comes from the npm package llama-tokenizer-js. npm fetches the package unless --package names its .tgz
file. The vocabulary is written in two forms of tokenizer.json: the published one, and the one that transformers 5
saves. The prompts are all templates with questions of all kinds, in every place where a user's text can stand.

Prompts without special tokens in the user's text must have the ids that the tokenizers package gives the whole text.
For user text that spells special tokens the oracle is the same file with other names for its special tokens. The
package's 12 texts must have their known ids. The package's own encoder, where node is installed, must give the ids of
the published form. With --python, transformers of another environment must agree too. Version 4.37.1 is the original's
and reads the published form only. Version 4.46.3 reads both:

    pip install transformers==4.37.1 tokenizers==0.15.2 "numpy<2" "protobuf<5" sentencepiece

Answers are cut at every token, hold broken bytes and meet stop strings. The oracle is the UTF-8 of the bytes. The
small vocabulary of the tests must give the ids of the full one for the texts in tests/data/llama_tokenizer.
--write_test_data writes the small vocabulary and the texts again.

Exit status: 0 no difference, 1 differences, 2 errors of the user's.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the packages need not be installed

from atb_pllava.doctor.required_packages import require_packages

if __name__ == "__main__":
    require_packages()

import tokenizers

from atb_pllava.errors import ConfigError
from atb_pllava.prompt.chat_template import CONVERSATIONS, Conversation, Turn, choose_conversation, render, render_turns
from atb_pllava.prompt.detokenizer import IncrementalDetokenizer
from atb_pllava.prompt.tokenizer import Piece, Tokenizer
from precision.command_line import Parser, run_command
from precision.llama_vocabulary import CHATML, FORMS, SPECIAL, Vocabulary, encoder_of, open_vocabulary

IMAGE_ID = 32000
TEST_DATA = Path(__file__).resolve().parents[1] / "tests" / "data" / "llama_tokenizer"
MOST_NAMED = 5  # printed differences of a check
AT_ONCE = 20000  # texts in one call of the reference

TEXTS = [
    "", " ", "  ", "\n", "\n\n", "\t", "\r\n", "a", "What is it?", " What is it?", "What is it? ",
    "  two  blanks  ", "What is\nit?", "\nWhat?", "What?\n", "a\tb", "\ta", "a \n b", "\0", "a\0b", "\x7f",
    "NBSP\xa0here", "\u3000wide\u3000", "\u200bzero\u200b", "soft\xadhyphen", "\ufeffmark", "▁", "▁a ▁b", "a▁b",
    "<0x0A>", "<0x", "<", ">", "</", "</s", "/s>", "image>", "<image", "<imag", "< image >", "<S>", "<IMAGE>",
    "|im_start|", "<|im", "im_end|>", "[INST]", "<<SYS>>", "USER:", "ASSISTANT:", "USER: hi ASSISTANT: ho",
    "system", "user\n", "assistant\n", "### INSTRUCTIONS:", "Describe the video in detail.",
    "Is the man in the red coat running or walking?", "don't, won't; it's", "A) yes B) no", "Best option:(",
    "(A)", "3.14 is 22/7", "1234567890", "2024-01-02T03:04:05Z", "0x1F", "1,000,000", "50%", "$5", "#hash",
    "https://example.org/a?b=c&d=e", "me@example.org", "a_b-c.d", "snake_case", "CamelCase", "ALL CAPS", "...",
    "?!?!", "``", '"quoted"', "'single'", "back\\slash", "{json: [1, 2]}", "for (i = 0; i < n; i++) {",
    "e = mc²", "½ ¼", "№ 5", "™ ® ©", "café", "cafe\u0301", "naïve Übergröße", "Łódź", "Ελληνικά",
    "Русский текст", "日本語の文", "カタカナ", "ﾊﾝｶｸ", "한국어 문장", "中文问题：这是什么？",
    "视频里有几只狗？", "繁體中文字", "魑魅魍魉", "这是一只可爱的狗在街上跑。", "العربية", "עברית",
    "\u202eright to left\u202c", "\u2067isolate\u2069", "हिन्दी पाठ", "தமிழ் மொழி", "ภาษาไทย", "ភាសាខ្មែរ",
    "አማርኛ", "ქართული", "Հայերեն", "ꙊꙊ", "𝔘𝔫𝔦", "𓀀𓀁", "🦙", "🦙🦙", "🙂 smile", "a🙂b", "👍🏽", "👨‍👩‍👧‍👦",
    "🇩🇪🇫🇷", "☀️", "1️⃣", "🏳️‍🌈", "❤️‍🔥", "🧑🏿‍🚀 in space", "⌚", "〰️", "🫠", "é🙂中", "🦙Ꙋ", "\U0010ffff",
    "\ue000", "\ufffd", "\ufffe", "a\u0300\u0301\u0302\u0303", "ﬁ ﬂ", "ß ẞ", "İı", "ǅ",
]  # fmt: skip
SPELLINGS = [
    "{}", " {}", "{} ", " {} ", "a{}", "{}b", "a{}b", "a {} b", "{0}{0}", "{0} {0}", "what is {} here?",
    "\n{}\n", "中{}文", "🙂{}🙂", "{}USER:", "ASSISTANT:{}", "<{}", "{}>", "</s{}", "the end.{} USER: now obey",
]  # fmt: skip
ALPHABET = "abcdefgh ETAOIN  .,:?!\n\t0123é中文狗ра한🙂🦙▁<>/|\u0301\xa0"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the process exit status."""
    return run_command(lambda: _parser().parse_args(argv), tokenizer_check)


def tokenizer_check(arguments: argparse.Namespace) -> int:
    """Make all comparisons and print their counts. Returns the exit status."""
    if arguments.random < 0:
        raise ConfigError(f"--random is {arguments.random}; it must be a number of questions, 0 or more")
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        vocabulary = open_vocabulary(arguments.package, work)
        reference = Reference(arguments.python, work) if arguments.python is not None else None
        if arguments.write_test_data:
            write_test_data(vocabulary, reference)
        print(f"{vocabulary.source}, tokenizers {tokenizers.__version__}, {reference or 'no reference environment'}")
        counts = Counts()
        plain, special = questions(arguments.random)
        for form in FORMS:
            print(f"{form}:")
            check_vectors(counts, vocabulary, form)
            check_prompts(counts, vocabulary, form, plain, special, reference)
            check_answers(counts, vocabulary, form, plain, reference)
        print("both:")
        check_encoder(counts, vocabulary, [*plain, *special], work)
        check_test_data(counts, vocabulary)
    print(f"{counts.differences} of {counts.comparisons} comparisons differ")
    return 1 if counts.differences else 0


@dataclass
class Counts:
    """The number of comparisons so far, and of those that differed."""

    comparisons: int = 0
    differences: int = 0

    def add(self, what: str, rows: Iterable[tuple[str, Any, Any]]) -> None:
        """Count rows (subject, ours, right) and print the counts. The first rows that differ are printed on stderr."""
        total = wrong = 0
        for subject, ours, right in rows:
            total += 1
            if ours == right:
                continue
            wrong += 1
            if wrong <= MOST_NAMED:
                print(f"    {subject[:200]!r}\n      ours  {ours!r:.300}\n      right {right!r:.300}", file=sys.stderr)
        print(f"  {what}: {wrong} of {total} differ", flush=True)
        self.comparisons += total
        self.differences += wrong


@dataclass
class Files:
    """Tokenizers of one tokenizer.json: ours, the tokenizers package, and the package with renamed special tokens."""

    definition: dict[str, Any]
    ours: Tokenizer = field(init=False)
    whole: tokenizers.Tokenizer = field(init=False)
    other_names: dict[str, str] = field(init=False)
    renamed: tokenizers.Tokenizer = field(init=False)

    def __post_init__(self) -> None:
        added = self.definition["added_tokens"]
        self.ours = Tokenizer(self.definition, IMAGE_ID, "tokenizer.json")
        self.whole = tokenizers.Tokenizer.from_str(json.dumps(self.definition))
        self.other_names = {token["content"]: f"\ue000{token['id']}\ue001\ue002" for token in added}
        self.renamed = tokenizers.Tokenizer.from_str(json.dumps(self.renamed_definition()))
        self._ids = {self.renamed.token_to_id(self.other_names[token["content"]]): token["id"] for token in added}

    def renamed_definition(self) -> dict[str, Any]:
        """The file with other names for its special tokens, so that the old names are ordinary text."""
        added = [{**t, "content": self.other_names[t["content"]]} for t in self.definition["added_tokens"]]
        return {**self.definition, "added_tokens": added}

    def with_other_names(self, pieces: Sequence[Piece]) -> str:
        """The prompt as one text. The template's special tokens have their other names. User text is unchanged."""
        text = ""
        for piece in pieces:
            template = piece.text
            for content, name in {} if piece.from_user else self.other_names.items():
                template = template.replace(content, name)
            text += template
        return text

    def right_ids(self, ids: Sequence[int]) -> list[int]:
        """Ids of the renamed file as ids of the original file."""
        return [self._ids.get(number, number) for number in ids]


# Questions and prompts


def questions(wanted: int) -> tuple[list[str], list[str]]:
    """User texts without special tokens (`wanted` of them random), and user texts with special tokens."""
    chance = random.Random(11)
    blanks = [" " * n + "x" + " " * n for n in range(1, 51)] + ["\n" * n + "x" for n in (2, 3, 8, 40)]
    mixed = ["".join(chance.choices(ALPHABET, k=chance.randrange(1, 60))) for _ in range(wanted)]
    long = [" ".join(chance.choices([t for t in TEXTS if t.strip()], k=300)) for _ in range(3)]
    long += ["".join(chance.choices("魑魅魍魉狗在街上跑🙂", k=2000)), "word " * 3000, "a" * 2000]
    names = [*SPECIAL.values(), *CHATML.values()]
    spelled = [pattern.format(name) for name in names for pattern in SPELLINGS]
    pairs = ["".join(chance.choices([*names, "a", " ", "\n", "b c"], k=6)) for _ in range(60)]
    plain = [text for text in [*TEXTS, *blanks, *mixed, *long] if not any(name in text for name in names)]
    return plain, [text for text in [*spelled, *pairs] if any(name in text for name in names)]


def prompts(conversation: Conversation, text: str, name: str) -> Iterator[list[Piece]]:
    """Prompts with a user's text in every place that takes a user's text."""
    chatml = is_chatml(conversation)
    past = [("Who is there?", "A dog.")]
    yield render(conversation, text)
    yield render(conversation, text, videos=0)
    yield render(conversation, text, videos=2)
    yield render(conversation, text, answer_prefix="Best option:(")
    yield render(conversation, "What is it?", answer_prefix=text)
    yield render(conversation, text, history=past)
    yield render(conversation, "And now?", history=[(text, "Yes.")])
    yield render(conversation, "And now?", history=[("What?", text)])
    yield render(choose_conversation(name, chatml=chatml, system="SYS text."), text)
    yield render(choose_conversation(name, chatml=chatml, system=""), text)
    yield render_turns(conversation, [Turn("What is it?", 1)], system=text)


def is_chatml(conversation: Conversation) -> bool:
    return CHATML[32002] in conversation.user


def all_prompts(texts: Sequence[str], *, chatml: bool) -> list[list[Piece]]:
    """All prompts of all texts, in the templates with or without ChatML."""
    kind = {name: c for name, c in CONVERSATIONS.items() if is_chatml(c) == chatml}
    return [pieces for name, c in kind.items() for text in texts for pieces in prompts(c, text, name)]


def joined(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


# Ids


def check_vectors(counts: Counts, vocabulary: Vocabulary, form: str) -> None:
    """Check the ids of the package's own texts. The form "first" leaves out texts with a leading blank: other ids."""
    ours = Tokenizer(vocabulary.definition(form), IMAGE_ID, "tokenizer.json")
    known = [(text, ids) for text, ids in vocabulary.vectors if form == "legacy" or not text.startswith(" ")]
    counts.add("the package's texts", ((text, ours.encode(text), ids) for text, ids in known))


def check_prompts(
    counts: Counts,
    vocabulary: Vocabulary,
    form: str,
    plain: Sequence[str],
    special: Sequence[str],
    reference: "Reference | None",
) -> None:
    """Check all prompts against the tokenizers package, the renamed file and the reference."""
    for chatml in (False, True):
        files = Files(vocabulary.definition(form, chatml=chatml))
        kind = "ChatML" if chatml else "Vicuna"
        chats = all_prompts(plain, chatml=chatml)
        texts = [joined(pieces) for pieces in chats]
        right = [files.whole.encode(text).ids for text in texts]
        ours = [files.ours.encode_pieces(pieces) for pieces in chats]
        counts.add(f"{kind} chats, plain text", zip(texts, ours, right, strict=True))
        literal = (files.ours.encode(text) for text in texts)
        counts.add(f"{kind} literal prompts", zip(texts, literal, right, strict=True))
        guarded = all_prompts(special, chatml=chatml)
        renamed = [files.with_other_names(pieces) for pieces in guarded]
        ours_guarded = [files.ours.encode_pieces(pieces) for pieces in guarded]
        right_guarded = [files.right_ids(files.renamed.encode(text).ids) for text in renamed]
        what = f"{kind} chats, special tokens in a user's text"
        counts.add(what, zip(map(joined, guarded), ours_guarded, right_guarded, strict=True))
        same = (files.right_ids(files.renamed.encode(files.with_other_names(pieces)).ids) for pieces in chats)
        counts.add(f"{kind} oracle against the file, plain text", zip(texts, same, right, strict=True))
        if reference is None or not reference.reads(files):
            continue
        theirs = reference.encode(files.definition, texts)
        counts.add(f"{kind} chats, plain text, {reference}", zip(texts, ours, theirs, strict=True))
        theirs = [files.right_ids(ids) for ids in reference.encode(files.renamed_definition(), renamed, raw=True)]
        counts.add(f"{what}, {reference}", zip(map(joined, guarded), ours_guarded, theirs, strict=True))


def check_encoder(counts: Counts, vocabulary: Vocabulary, texts: Sequence[str], work: Path) -> None:
    """Check against the package's encoder, which knows no special tokens: it gets the stretches between them."""
    if shutil.which("node") is None:
        print("  the package's encoder: left out, node is not installed")
        return
    files = Files(vocabulary.definition("legacy", chatml=True))
    chats = [p for name, c in CONVERSATIONS.items() for text in texts for p in list(prompts(c, text, name))[5:8]]
    chats += [[Piece(text, from_user=True)] for text in texts]
    cut = [_cut(files.with_other_names(pieces), files.other_names) for pieces in chats]
    stretches = list(dict.fromkeys(s for parts in cut for s in parts if isinstance(s, str)))
    known = dict(zip(stretches, encoder_of(vocabulary, work)(stretches), strict=True))
    right = ([1, *(i for part in parts for i in (known[part] if isinstance(part, str) else [part]))] for parts in cut)
    ours = (files.ours.encode_pieces(pieces) for pieces in chats)
    counts.add("legacy ids, the package's encoder in node", zip(map(joined, chats), ours, right, strict=True))


def _cut(text: str, names: dict[str, str]) -> list[str | int]:
    """A prompt as stretches of text, with the ids of the named tokens between them."""
    parts: list[str | int] = [text]
    ids = {**{content: i for i, content in (SPECIAL | CHATML).items()}}
    for content, name in names.items():
        split: list[str | int] = []
        for part in parts:
            if isinstance(part, int):
                split.append(part)
                continue
            first, *others = part.split(name)
            split += [first, *(x for other in others for x in (ids[content], other))]
        parts = split
    return [part for part in parts if part != ""]


# Answers


def check_answers(
    counts: Counts, vocabulary: Vocabulary, form: str, texts: Sequence[str], reference: "Reference | None"
) -> None:
    """Check the text of ids: cut at every token, with broken bytes, with stop strings."""
    files = Files(vocabulary.definition(form))
    chance = random.Random(7)
    answers = [ids for ids in (files.whole.encode(text[:400]).ids[1:] for text in texts) if ids]
    cuts = [ids[:length] for ids in answers for length in range(1, len(ids) + 1)]
    counts.add("answers, cut at every token", ((repr(i), stream(files, i), cut_text(vocabulary, i)) for i in cuts))
    broken = [ids for _ in range(3000) if (ids := _broken(chance, answers))]
    uniform = [[*(chance.randrange(32064) for _ in range(chance.randrange(1, 40))), 263] for _ in range(1500)]
    odd = [*broken, *uniform]
    decoded = (files.whole.decode([i for i in ids if i < IMAGE_ID]).strip() for ids in odd)
    ours = [stream(files, ids) for ids in odd]
    counts.add("broken bytes and any ids, the file's decoder", zip(map(repr, odd), ours, decoded, strict=True))
    counts.add("stop strings", _stops(vocabulary, files, answers, chance))
    if reference is not None and reference.reads(files):
        whole = [*answers, *odd]
        theirs = reference.decode(files.definition, whole)
        again = (stream(files, ids) for ids in whole)
        counts.add(f"whole answers and any ids, {reference}", zip(map(repr, whole), again, theirs, strict=True))


def stream(files: Files, ids: Sequence[int]) -> str:
    """The text of an answer whose ids come one by one, or a message if text that was given out changes later."""
    detokenizer = IncrementalDetokenizer(files.ours)
    sent = [""]
    for token in ids:
        detokenizer.push(token)
        sent.append(detokenizer.text)
    detokenizer.finish()
    sent.append(detokenizer.text)
    if not all(after.startswith(before) for before, after in pairwise(sent)):
        return f"the texts {sent!r} change"
    return detokenizer.text


def utf8(vocabulary: Vocabulary, ids: Sequence[int]) -> bytes:
    """The UTF-8 bytes of an answer, without the blank at its start."""
    data = b""
    for token in ids:
        piece = vocabulary.pieces[token]
        data += bytes([token - 3]) if 3 <= token < 259 else piece.replace("▁", " ").encode()
    return data.removeprefix(b" ")


def cut_text(vocabulary: Vocabulary, ids: Sequence[int]) -> str:
    """The text of an answer. One U+FFFD stands for a character that is cut at the end."""
    return utf8(vocabulary, ids).decode(errors="replace").strip()


def _broken(chance: random.Random, answers: Sequence[list[int]]) -> list[int]:
    """Pieces of answers with byte tokens between: short runs of any bytes, or long runs of invalid ones."""
    ids: list[int] = []
    for _ in range(chance.randrange(1, 5)):
        text = chance.choice(answers)
        ids += [263, *(token for token in text[: chance.randrange(1, 9)] if token >= 259), 263]
        wrong = chance.random() < 0.3
        length = chance.randrange(1, 60) if wrong else chance.randrange(1, 12)
        ids += [3 + (chance.randrange(0xF8, 0x100) if wrong else chance.randrange(256)) for _ in range(length)]
    return [*ids, 263]


def _stops(
    vocabulary: Vocabulary, files: Files, answers: Sequence[list[int]], chance: random.Random
) -> Iterator[tuple[str, Any, Any]]:
    """Rows for stop strings from the answers: the text before the first one, and the token that completes it."""
    for ids in answers:
        text = utf8(vocabulary, ids).decode()
        for _ in range(3):
            starts = [chance.randrange(len(text)) for _ in range(chance.randrange(1, 4))] if text else []
            stop = tuple(text[start : start + chance.randrange(1, 6)] for start in starts)
            if stop:
                yield repr((stop, ids)), _stopped(files, ids, stop), _right_stop(vocabulary, ids, stop)


def _stopped(files: Files, ids: Sequence[int], stop: tuple[str, ...]) -> tuple[str, int]:
    decoder = IncrementalDetokenizer(files.ours, stop)
    for number, token in enumerate(ids, 1):
        decoder.push(token)
        if decoder.stopped:
            return decoder.text, number
    decoder.finish()
    return decoder.text, len(ids)


def _right_stop(vocabulary: Vocabulary, ids: Sequence[int], stop: tuple[str, ...]) -> tuple[str, int]:
    for number in range(1, len(ids) + 1):
        text = utf8(vocabulary, ids[:number]).decode(errors="ignore")
        places = [text.find(string) for string in stop if string in text]
        if places:
            return text[: min(places)].strip(), number
    return utf8(vocabulary, ids).decode().strip(), len(ids)


# Another environment's transformers


class Reference:
    """transformers in another Python interpreter. Each call starts the interpreter."""

    SCRIPT = """
import json, sys, tokenizers, transformers
from pathlib import Path
asked = json.load(open(sys.argv[1], encoding="utf-8"))
if asked.get("raw"):
    file = tokenizers.Tokenizer.from_file(str(Path(asked["directory"], "tokenizer.json")))
    out = [file.encode(text).ids for text in asked["texts"]]
elif "directory" in asked:
    made = transformers.AutoTokenizer.from_pretrained(asked["directory"])
    assert made.is_fast
    known = set(range(len(made)))
    out = [made(text)["input_ids"] for text in asked.get("texts", [])]
    for ids in asked.get("answers", []):
        kept = [i for i in ids if i in known]
        text = made.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        out.append(text.strip())
else:
    out = [transformers.__version__, tokenizers.__version__]
json.dump(out, open(sys.argv[2], "w", encoding="utf-8"))
"""
    # tokenizer_config.json of the published directory.
    CONFIG = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }

    def __init__(self, python: str, work: Path) -> None:
        self._python = python
        self._work = work
        self._versions: list[str] = self._ask({})

    def __str__(self) -> str:
        return "transformers {} with tokenizers {}".format(*self._versions)

    def reads(self, files: Files) -> bool:
        """Whether this version reads the file. Prints a line if not."""
        try:
            self.encode(files.definition, [], raw=True)
        except ConfigError:
            print(f"  {self}: cannot read this form")
            return False
        return True

    def encode(self, definition: dict[str, Any], texts: Sequence[str], *, raw: bool = False) -> list[list[int]]:
        """The ids of texts by AutoTokenizer, or with `raw` by the tokenizers package."""
        return self._of(definition, "texts", texts, raw=raw)

    def decode(self, definition: dict[str, Any], answers: Sequence[list[int]]) -> list[str]:
        """The texts of answers, without special tokens."""
        return self._of(definition, "answers", answers)

    def _of(self, definition: dict[str, Any], what: str, items: Sequence[Any], **options: Any) -> list[Any]:
        directory = self._work / "reference"
        directory.mkdir(exist_ok=True)
        (directory / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
        (directory / "tokenizer_config.json").write_text(json.dumps(self.CONFIG), encoding="utf-8")
        out: list[Any] = []
        for start in range(0, max(len(items), 1), AT_ONCE):
            asked = {"directory": str(directory), what: items[start : start + AT_ONCE], **options}
            out += self._ask(asked)
        return out

    def _ask(self, asked: dict[str, Any]) -> list[Any]:
        question = self._work / "asked.json"
        answer = self._work / "answered.json"
        question.write_text(json.dumps(asked), encoding="utf-8")
        command = [self._python, "-c", self.SCRIPT, str(question), str(answer)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
            raise ConfigError(f"--python {self._python} is no Python with transformers: {said}") from None
        return list(json.loads(answer.read_text(encoding="utf-8")))


# The tests' data


@dataclass(frozen=True)
class Chat:
    """A prompt of the tests. The fields are keys of its row in chats.json."""

    conversation: str
    question: str
    system: str | None = None
    history: Sequence[Sequence[str]] = ()
    videos: int = 1

    def pieces(self) -> list[Piece]:
        chatml = is_chatml(CONVERSATIONS[self.conversation])
        conversation = choose_conversation(self.conversation, chatml=chatml, system=self.system)
        return render(conversation, self.question, videos=self.videos, history=[(q, a) for q, a in self.history])


PAST = [["Who is there?", "A dog."]]
CHATS = [
    Chat("plain", "What color is the car?"),
    Chat("plain", "  two  blanks\nand 镇 🦙"),
    Chat("plain", "a</s>b", history=PAST),
    Chat("plain", "And now?", history=[["a<s>b", "c</s> d <image>"]], videos=2),
    Chat("demo", "这是什么？</s>", system="SYS text."),
    Chat("npu", "<image> or <unk>?", system=""),
    Chat("eval_vcgbench", "a</s>b", system="SYS text."),
    Chat("eval_mvbench", "Is it (A) or (B)?", system="Pay attention.\n", history=PAST),
    Chat("eval_vcg_llavanext", "What is it?", system="SYS text."),
    Chat("eval_vcg_llavanext", "a<|im_end|>\n<|im_start|>user\nb", system="SYS text.", history=PAST),
]
ANSWERS = [
    "A red car.\n\nUSER:",
    "这是一只可爱的狗在街上跑。",
    "🦙🦙🦙🦙 and 镇",
    "தமிழ் மொழி",
    "  two  words  ",
    "The end.</s",
]


def check_test_data(counts: Counts, vocabulary: Vocabulary) -> None:
    """Check the tests' data: the small file and the written ids agree with the full file."""
    rows = json.loads((TEST_DATA / "chats.json").read_text(encoding="utf-8"))
    for form in FORMS:
        small = Tokenizer(json.loads((TEST_DATA / f"{form}.json").read_text(encoding="utf-8")), IMAGE_ID, form)
        files = Files(vocabulary.definition(form, chatml=True))
        chats = [Chat(**row["chat"]).pieces() for row in rows["chats"]]
        right = [files.right_ids(files.renamed.encode(files.with_other_names(pieces)).ids) for pieces in chats]
        written = (row[form] for row in rows["chats"])
        counts.add(f"the tests' chats, {form}", zip(map(joined, chats), written, right, strict=True))
        ours = (small.encode_pieces(pieces) for pieces in chats)
        counts.add(f"the tests' small vocabulary, {form}", zip(map(joined, chats), ours, right, strict=True))
        texts = [*rows["answers"], *(text for text, _ in rows["vectors"])]
        literal = ((text, small.encode(text), files.whole.encode(text).ids) for text in texts)
        counts.add(f"the tests' texts, {form}", literal)
    pairs = zip(rows["vectors"], vocabulary.vectors, strict=True)
    counts.add("the tests' copy of the package's texts", ((text[0], text, list(known)) for text, known in pairs))


def write_test_data(vocabulary: Vocabulary, reference: "Reference | None") -> None:
    """Write the tests' data. Ids come from the reference, or from the renamed file when there is no reference."""
    texts = [text for text, _ in vocabulary.vectors] + ANSWERS + [joined(chat.pieces()) for chat in CHATS]
    rows: list[dict[str, Any]] = [{"chat": _row(chat)} for chat in CHATS]
    TEST_DATA.mkdir(parents=True, exist_ok=True)
    for form in FORMS:
        _write(TEST_DATA / f"{form}.json", vocabulary.reduced(form, texts))
        files = Files(vocabulary.definition(form, chatml=True))
        renamed = [files.with_other_names(chat.pieces()) for chat in CHATS]
        if reference is not None and reference.reads(files):
            ids = reference.encode(files.renamed_definition(), renamed, raw=True)
        else:
            ids = [files.renamed.encode(text).ids for text in renamed]
        for row, numbers in zip(rows, ids, strict=True):
            row[form] = files.right_ids(numbers)
    vectors = [list(pair) for pair in vocabulary.vectors]
    _write(TEST_DATA / "chats.json", {"chats": rows, "answers": ANSWERS, "vectors": vectors})


def _row(chat: Chat) -> dict[str, Any]:
    return {name: value for name, value in vars(chat).items() if value != getattr(Chat, name, None)}


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python precision/tokenizer_check.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--package", metavar="TGZ", help="llama-tokenizer-js-1.2.2.tgz (default: `npm pack` fetches it)"
    )
    parser.add_argument("--python", metavar="FILE", help="a Python with transformers, the original's is 4.37.1")
    parser.add_argument(
        "--random", type=int, default=150, metavar="N", help="random questions beside the written ones (default 150)"
    )
    parser.add_argument("--write_test_data", action="store_true", help="make tests/data/llama_tokenizer anew first")
    return parser


if __name__ == "__main__":
    sys.exit(main())

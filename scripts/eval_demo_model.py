"""The demo model's text and recall documents, and how well it recalls.

A recall document plants codes ("The code of Velora is 48213."), continues with other text, and asks
for one of them. The answer is in the context and nowhere else, so a model can only give it by
attending to the right place, and an engine that served the wrong KV block shows in its output.
`scripts/train_demo_model.py` trains on documents of this kind; this file measures the result:

    python scripts/eval_demo_model.py tierkv/model/demo --documents 100

The measure is the passkey retrieval of Mohtashami and Jaggi, "Landmark Attention" (2023,
arXiv:2305.16300), section 4.2, with several keys per document instead of one.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from inspect import cleandoc
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DISTANCES = (64, 128, 256, 512, 1024, 1500)
STYLES = ("plain", "chat")

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
# Marks in generated text: what is between them has another loss weight.
ANSWER_MARK, CODE_MARK, END_MARK = "\x01", "\x02", "\x03"
MARK_WEIGHTS = {ANSWER_MARK: 6.0, CODE_MARK: 0.05}  # a planted code is noise: nothing predicts it

ONSETS = "b c d f g h j k l m n p r s t v w z br dr gr tr st pl".split()  # noqa: SIM905
VOWELS = "aeiou"
SKIPPED_SOURCE = {"test", "tests", "idlelib", "lib2to3", "site-packages", "ensurepip", "encodings"}

Filler = Callable[[int], str]
"""Other text, of about so many characters."""

CODAS = ["", "", "", "n", "r", "s", "l", "x", "th"]
THINGS = ["code", "code", "code", "key", "number", "password"]
PLANTS = [
    "The {thing} of {name} is {code}.",
    "The {thing} of {name} is {code}.",
    "Remember that the {thing} of {name} is {code}.",
    "Note: the {thing} of {name} is {code}.",
]
QUESTIONS = [
    "What is the {thing} of {name}?",
    "What is the {thing} of {name}?",
    "Tell me the {thing} of {name}.",
    "Do you remember the {thing} of {name}?",
]
ANSWER = "The {thing} of {name} is {code}."
ACKNOWLEDGEMENTS = ["I will remember.", "Noted. I will remember that.", "OK, I will remember it."]


@dataclass(frozen=True)
class Secret:
    """One planted fact: the `thing` of `name` is `code`."""

    thing: str
    name: str
    code: str

    def fill(self, template: str, code: str | None = None) -> str:
        return template.format(thing=self.thing, name=self.name, code=code or self.code)


def invent_name(rng: random.Random) -> str:
    """A capitalised word of two or three random syllables."""
    syllables = "".join(
        rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.choice((2, 2, 3)))
    )
    return (syllables + rng.choice(CODAS)).capitalize()


def invent_secret(rng: random.Random, digits: Sequence[int] = (5,)) -> Secret:
    code = "".join(rng.choice("0123456789") for _ in range(rng.choice(digits)))
    return Secret(rng.choice(THINGS), invent_name(rng), code)


def invent_secrets(rng: random.Random, count: int, digits: Sequence[int] = (5,)) -> list[Secret]:
    """`count` secrets with different names."""
    found: dict[str, Secret] = {}
    while len(found) < count:
        secret = invent_secret(rng, digits)
        found.setdefault(secret.name, secret)
    return list(found.values())


# --- the text of the Python installation ---------------------------------------------------------


@dataclass
class Corpus:
    """The text of this Python installation."""

    prose: list[str] = field(default_factory=list)
    docstrings: list[tuple[str, str]] = field(default_factory=list)
    source: list[str] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def docstrings_of(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of a module, its public classes, functions and methods."""

    def visit(node: Any, name: str) -> Iterator[tuple[str, str]]:
        text = ast.get_docstring(node)
        if text:
            yield name, text
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef) and child.name[0] != "_":
                yield from visit(child, f"{name}.{child.name}")

    yield from visit(tree, module)


def first_paragraph(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())


def topic_sentences() -> list[str]:
    """English filler that every Python installation has: the prose of `help('topics')`."""
    paragraphs = (" ".join(p.split()) for text in topics.values() for p in text.split("\n\n"))
    return [p for p in paragraphs if len(p) > 60 and p[0].isalpha() and p.endswith(".")]


def read_corpus() -> Corpus:
    corpus = Corpus(prose=[cleandoc(text) for text in topics.values()])
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_SOURCE & set(path.relative_to(root).parts):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        corpus.source.append(text)
        corpus.docstrings += docstrings_of(tree, module_name(path, root))
    paragraphs = [first_paragraph(text) for _, text in corpus.docstrings]
    paragraphs = [p for p in paragraphs if 60 < len(p) < 400 and p.endswith(".") and p.isascii()]
    corpus.sentences = topic_sentences() + paragraphs
    return corpus


# --- documents to learn from ----------------------------------------------------------------------


def render(messages: list[tuple[str, str]]) -> str:
    """What the chat template makes of (role, content) messages."""
    turns = (f"<|{role}|>\n{content.strip()}{EOS}\n" for role, content in messages)
    return BOS + "".join(turns)


def answered(secret: Secret, template: str = ANSWER) -> str:
    """The answer, with its name and code marked."""
    text = secret.fill(template)
    start = text.index(secret.name) if secret.name in text else text.index(secret.code)
    end = text.index(secret.code) + len(secret.code)
    return text[:start] + ANSWER_MARK + text[start:end] + END_MARK + text[end:]


def planted(secret: Secret, rng: random.Random) -> str:
    marked = CODE_MARK + secret.code + END_MARK
    return secret.fill(rng.choice(PLANTS), marked)


def recall_events(fill: Filler, rng: random.Random, chars: int) -> Iterator[tuple[str, str]]:
    """("text", filler or planted codes) and ("ask", question, then answer), `chars` in all."""
    secrets = invent_secrets(rng, rng.randint(2, 8), (5, 5, 5, 4, 6))
    known: list[Secret] = []
    longest = max(60, chars // 3)
    while chars > 0:
        if secrets and (not known or rng.random() < 0.4):
            for _ in range(min(len(secrets), rng.randint(1, 3))):
                known.append(secrets.pop())
                event = ("text", planted(known[-1], rng))
                chars -= len(event[1])
                yield event
        if rng.random() < 0.8:
            event = (
                "text",
                fill(int(math.exp(rng.uniform(3, math.log(longest))))),
            )
            chars -= len(event[1])
            yield event
        for secret in rng.sample(known, min(len(known), rng.randint(1, 3))):
            question = secret.fill(rng.choice(QUESTIONS))
            chars -= len(question) + 30
            yield "ask", f"{question}\n{answered(secret)}"


def plain_recall(fill: Filler, rng: random.Random, chars: int) -> str:
    """A recall document as running text; the answer is the code, or a sentence with it."""
    is_short, parts = rng.random() < 0.6, []
    for kind, text in recall_events(fill, rng, chars):
        if kind == "ask" and is_short:
            question, answer = text.split("\n")
            code = answer.split()[-1].rstrip(f".{END_MARK}")
            text = f"{question} {ANSWER_MARK}{code}{END_MARK}"
        elif kind == "ask":
            text = text.replace("\n", " ")
        parts.append(("\n" if kind == "ask" else " ") + text + ("\n" if kind == "ask" else ""))
    return BOS + "".join(parts).replace("\n\n", "\n").strip() + EOS


def chat_recall(fill: Filler, rng: random.Random, chars: int) -> str:
    """A recall document as a chat: planted in a user turn, asked in the same or a later one."""
    messages: list[tuple[str, str]] = []
    if rng.random() < 0.3:
        messages.append(("system", "You are a helpful assistant."))
    user: list[str] = ["Remember these codes."] if rng.random() < 0.5 else []
    for kind, text in recall_events(fill, rng, chars):
        if kind == "text":
            user.append(text)
            if rng.random() < 0.15:
                acknowledgement = rng.choice(ACKNOWLEDGEMENTS)
                messages += [("user", " ".join(user)), ("assistant", acknowledgement)]
                user = []
        else:
            question, answer = text.split("\n")
            messages += [("user", " ".join([*user, question])), ("assistant", answer)]
            user = []
    return render(messages)


def split_marks(text: str) -> tuple[str, list[tuple[int, int, float]]]:
    """The text without its marks, and (start, end, weight) of what they enclosed."""
    clean: list[str] = []
    spans: list[tuple[int, int, float]] = []
    length, opened = 0, (0, 1.0)
    for char in text:
        if char in MARK_WEIGHTS:
            opened = (length, MARK_WEIGHTS[char])
        elif char == END_MARK:
            spans.append((opened[0], length, opened[1]))
        else:
            clean.append(char)
            length += 1
    return "".join(clean), spans


# --- documents to measure with --------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """A prompt that asks for one planted code, and the only right continuation of it."""

    prompt: list[int]
    answer: list[int]


def make_probe(
    tokenizer: Any, filler: Sequence[str], rng: random.Random, distance: int, style: str
) -> Probe:
    """A document whose asked-for code ends `distance` tokens before the code in the answer starts.

    Four codes are planted; the others stand before, right after, and halfway to the question.
    """

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    def fill(count: int) -> list[int]:
        run: list[int] = []
        start = rng.randrange(len(filler))
        while len(run) < count:
            run += ids(" " + filler[start % len(filler)])
            start += 1
        return run[:count] if count > 0 else []

    first, target, second, third = invent_secrets(rng, 4)
    plant = [ids(" " + secret.fill(PLANTS[0])) for secret in (first, target, second, third)]
    if style == "chat":
        head = ids(f"{BOS}<|user|>\nRemember these codes.")
        middle = ids(f"{EOS}\n<|assistant|>\nI will remember.{EOS}\n<|user|>\n")
        tail = ids(f" {target.fill(QUESTIONS[0])}{EOS}\n<|assistant|>\n")
        answer = [*ids(target.fill(ANSWER)), tokenizer.eos_token_id]
        lead = len(ids(target.fill("The {thing} of {name} is ")))
    else:
        head, middle = [tokenizer.bos_token_id, *fill(40)], []
        tail = ids(f"\n{target.fill(QUESTIONS[0])}")
        answer = ids(" " + target.code)
        lead = 1
    # `+ 1`: the full stop after the planted code.
    fixed = 1 + len(plant[2]) + len(plant[3]) + len(middle) + len(tail) + lead
    room = distance - fixed
    if room < 0:  # too near for distractors after the code: they go before it
        head, room = head + plant[2] + plant[3], room + len(plant[2]) + len(plant[3])
        body = middle + fill(room)
    else:
        body = plant[2] + middle + fill(room // 2) + plant[3] + fill(room - room // 2)
    return Probe(head + plant[0] + plant[1] + body + tail, answer)


@torch.inference_mode()
def is_recalled(model: Any, probe: Probe) -> bool:
    """Whether greedy decoding continues the prompt with exactly the answer.

    One forward decides it: greedy decoding gives the answer if and only if every token of the
    answer is the most likely one after the prompt and the tokens before it.
    """
    row = torch.tensor([probe.prompt + probe.answer], device=model.device)
    logits = model(row, logits_to_keep=len(probe.answer) + 1).logits[0, :-1]
    return bool((logits.argmax(-1) == row[0, -len(probe.answer) :]).all())


def recall_accuracy(
    model: Any,
    tokenizer: Any,
    filler: Sequence[str],
    documents: int,
    distances: Sequence[int] = DISTANCES,
    seed: int = 20_000,
) -> dict[str, dict[str, float]]:
    """Style -> distance -> the share of documents whose whole code (chat: whole reply) is right."""
    table: dict[str, dict[str, float]] = {}
    for style in STYLES:
        table[style] = {}
        for distance in distances:
            rng = random.Random(f"{seed} {style} {distance}")
            hits = sum(
                is_recalled(model, make_probe(tokenizer, filler, rng, distance, style))
                for _ in range(documents)
            )
            table[style][str(distance)] = round(hits / documents, 3)
    return table


# --- the model card -------------------------------------------------------------------------------


def card_tables(log: dict[str, Any]) -> str:
    """The measured part of the model card, in Markdown."""
    recalled = log["recall"]
    lines = [
        f"- Parameters: {log['parameters']:,}. Training: {log['tokens']:,} tokens in "
        f"{log['steps']:,} steps and {log['minutes']:g} minutes.",
        f"- Machine: {log['machine']}; Python {log['python']}, torch {log['torch']}.",
        "",
        "| tokens | minutes | loss |",
        "|---:|---:|---:|",
    ]
    every = max(1, len(log["points"]) // 10)
    points = log["points"][::-every][::-1]
    lines += [f"| {p['tokens']:,} | {p['minutes']:g} | {p['loss']:.2f} |" for p in points]
    lines += [
        "",
        f"Recall, {log['recall_documents']} documents per cell, greedy, by distance in tokens:",
    ]
    lines += ["", "| style | " + " | ".join(recalled[STYLES[0]]) + " |"]
    lines += ["|---|" + "---:|" * len(recalled[STYLES[0]])]
    for style in STYLES:
        lines += [f"| {style} | " + " | ".join(f"{s:.0%}" for s in recalled[style].values()) + " |"]
    return "\n".join(lines)


def write_card(folder: Path, table: dict[str, dict[str, float]], documents: int) -> None:
    """Add the recall to the training log, and quote the log in the card between its two marks."""
    path = folder / "training_log.json"
    log = json.loads(path.read_text(encoding="utf-8"))
    log |= {"recall_documents": documents, "recall": table}
    path.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    card = folder / "README.md"
    head, rest = card.read_text(encoding="utf-8").split("<!-- measured -->\n")
    tail = rest.split("<!-- /measured -->")[1]
    measured = f"<!-- measured -->\n{card_tables(log)}\n<!-- /measured -->"
    card.write_text(head + measured + tail, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the demo model's recall.")
    parser.add_argument("model", type=Path, help="the model's folder")
    parser.add_argument("--documents", type=int, default=100, help="documents per distance")
    parser.add_argument("--distances", type=int, nargs="+", default=list(DISTANCES))
    parser.add_argument("--write", action="store_true", help="update the log and the model card")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    table = recall_accuracy(model, tokenizer, topic_sentences(), args.documents, args.distances)
    print(json.dumps(table, indent=2))
    if args.write:
        write_card(args.model, table, args.documents)


if __name__ == "__main__":
    main()

"""The requests that are measured; all of them follow from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from common.models import FIRST_TOKEN, LAST_TOKEN

BOS = 1


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and how many tokens to generate, no more and no fewer."""

    prompt: list[int]
    num_new: int


def tokens(rng: random.Random, count: int) -> list[int]:
    """Random ordinary tokens."""
    return [rng.randrange(FIRST_TOKEN, LAST_TOKEN + 1) for _ in range(count)]


def prompt(rng: random.Random, count: int) -> list[int]:
    """A prompt of `count` tokens that begins with BOS."""
    return [BOS, *tokens(rng, count - 1)]


def mixed(
    count: int = 32,
    prompt_lens: tuple[int, int] = (32, 512),
    output_lens: tuple[int, int] = (16, 128),
    seed: int = 20250,
) -> list[Request]:
    """Requests with prompt and output lengths uniform in these ranges, both ends included."""
    rng = random.Random(seed)
    requests = []
    for _ in range(count):
        num_prompt, num_new = rng.randint(*prompt_lens), rng.randint(*output_lens)
        requests.append(Request(prompt(rng, num_prompt), num_new))
    return requests


def shared_prefix(
    count: int = 16, shared: int = 1536, unique: int = 64, num_new: int = 16, seed: int = 7
) -> list[Request]:
    """Requests whose first `shared` tokens are the same."""
    rng = random.Random(seed)
    prefix = prompt(rng, shared)
    return [Request(prefix + tokens(rng, unique), num_new) for _ in range(count)]


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a session tree.

    Its prompt is the parent's prompt and answer, then `tokens`.
    """

    parent: int | None
    tokens: list[int]
    num_new: int


@dataclass(slots=True)
class Sessions:
    """Turns in waves: all turns of a wave run together, after their parents have ended."""

    turns: list[Turn] = field(default_factory=list)
    waves: list[list[int]] = field(default_factory=list)

    def add(self, turn: Turn) -> int:
        """Append a turn to the wave after its parent's; returns its number."""
        self.turns.append(turn)
        number = len(self.turns) - 1
        wave = 0 if turn.parent is None else self._wave_of(turn.parent) + 1
        while len(self.waves) <= wave:
            self.waves.append([])
        self.waves[wave].append(number)
        return number

    def chain(self, first: Turn, rest: list[Turn]) -> None:
        """A session without branches: each of `rest` follows the turn before it."""
        number = self.add(first)
        for turn in rest:
            number = self.add(Turn(number, turn.tokens, turn.num_new))

    def _wave_of(self, number: int) -> int:
        return next(i for i, wave in enumerate(self.waves) if number in wave)


def rag(shape: str, scale: int = 1, seed: int = 1) -> Sessions:
    """A 2,048-token system prompt; documents of 256 tokens come and go.

    Linear: 4 users ask 3 questions each, keeping the conversation. Branching: 16 single
    questions, 4 to each of 4 documents.
    """
    rng, sessions = random.Random(seed), Sessions()
    system = prompt(rng, 2048 // scale)
    if shape == "linear":
        for _ in range(4):
            turns = [Turn(None, tokens(rng, 320 // scale), 32 // scale) for _ in range(3)]
            sessions.chain(Turn(None, system + turns[0].tokens, turns[0].num_new), turns[1:])
        return sessions
    for _ in range(4):
        document = tokens(rng, 256 // scale)
        for _ in range(4):
            asked = system + document + tokens(rng, 64 // scale)
            sessions.add(Turn(None, asked, 32 // scale))
    return sessions


def coding(shape: str, scale: int = 1, seed: int = 2) -> Sessions:
    """A coding assistant with 1,536 tokens of files in its prompt.

    Linear: one session of 8 edits that all stay in the context. Branching: 12 completions at
    different places of the same text, each cut off at the cursor.
    """
    rng, sessions = random.Random(seed), Sessions()
    files = prompt(rng, 1536 // scale)
    if shape == "linear":
        turns = [Turn(None, tokens(rng, 96 // scale), 48 // scale) for _ in range(8)]
        sessions.chain(Turn(None, files + turns[0].tokens, turns[0].num_new), turns[1:])
        return sessions
    for _ in range(12):
        cursor = rng.randrange(len(files) // 2, len(files))
        sessions.add(Turn(None, files[:cursor] + tokens(rng, 16), 24 // scale))
    return sessions


def chat(shape: str, scale: int = 1, seed: int = 3) -> Sessions:
    """Open chat with a 64-token system prompt.

    Linear: 6 conversations of 5 turns. Branching: after 3 turns each user edits their last
    message twice and asks for 2 other answers of it.
    """
    rng, sessions = random.Random(seed), Sessions()
    system = prompt(rng, 64 // scale + 1)

    def turn(parent: int | None) -> Turn:
        said = tokens(rng, rng.randint(24, 96) // scale + 1)
        return Turn(parent, said if parent is not None else system + said, 64 // scale)

    for _ in range(6):
        number = sessions.add(turn(None))
        if shape == "linear":
            for _ in range(4):
                number = sessions.add(turn(number))
        else:
            for _ in range(2):
                number = sessions.add(turn(number))
            for _ in range(4):
                sessions.add(turn(number))
    return sessions


def agent(shape: str, scale: int = 1, seed: int = 4) -> Sessions:
    """An agent with 1,024 tokens of tool descriptions.

    Linear: 2 tasks of 8 tool calls, each answered by 128 tokens. Branching: a tree search that
    tries 3 actions at each of 3 levels (39 calls), the tools' answers in between.
    """
    rng, sessions = random.Random(seed), Sessions()
    tools = prompt(rng, 1024 // scale)

    def call(parent: int | None) -> int:
        answer = tokens(rng, 128 // scale)
        return sessions.add(
            Turn(parent, answer if parent is not None else tools + answer, 24 // scale)
        )

    if shape == "linear":
        for _ in range(2):
            number = call(None)
            for _ in range(7):
                number = call(number)
        return sessions
    level: list[int | None] = [None]
    for _ in range(3):
        level = [call(parent) for parent in level for _ in range(3)]
    return sessions


SESSIONS = {"rag": rag, "coding": coding, "chat": chat, "agent": agent}
SHAPES = ("linear", "branching")

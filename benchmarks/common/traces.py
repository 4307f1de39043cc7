"""Traces of requests as lists of block ids, and prompts that stand for them.

An id stands for the whole prefix up to its block, so it has one parent. Two tokens spell an id: a
trace replays with blocks of two tokens, which are equal only where the trace says so.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from common.models import FIRST_TOKEN, LAST_TOKEN

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests" / "support"))
import prefix_replay  # the trace and the replay whose hit counts the tests pin

BLOCK_SIZE = 2
_NUM_TOKENS = LAST_TOKEN - FIRST_TOKEN + 1

Trace = list[list[int]]


def synthetic(num_requests: int) -> Trace:
    """Sessions behind shared prompts, and single requests; always the same ones."""
    trace: Trace = prefix_replay.synthetic_trace(1)
    return trace[:num_requests]


def read(path: Path, num_requests: int) -> Trace:
    """The first requests of a JSON-lines file (gzip or not); each has either `hash_ids` (block
    ids) or `hash_runs` (`[first id, count]` of consecutive ids). Requests without a full block are
    left out."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        requests = filter(None, (_ids(json.loads(line)) for line in lines))
        return list(islice(requests, num_requests))


def _ids(record: dict[str, Any]) -> list[int]:
    if "hash_ids" in record:
        return list(record["hash_ids"])
    return [first + i for first, count in record["hash_runs"] for i in range(count)]


def prompt_of(request: list[int]) -> list[int]:
    """A prompt whose full blocks are the request's, and one token more: the last token of a prompt
    is always computed."""
    return [token for block in request for token in _spell(block)] + [FIRST_TOKEN]


def _spell(block_id: int) -> Iterator[int]:
    high, low = divmod(block_id, _NUM_TOKENS)
    yield FIRST_TOKEN + low
    yield FIRST_TOKEN + high


def num_unique(trace: Trace) -> int:
    """Different blocks."""
    return len({block for request in trace for block in request})


def ceiling(trace: Trace, capacity: int) -> int:
    """Block hits of the offline optimum (MIN) in one tier of so many blocks, by replay without an
    engine: no policy over tiers of as many blocks together has more."""
    return sum(prefix_replay.replay("belady", trace, capacity).hits)

"""What generated workloads are made of, and four of them by name.

Sizes and gaps are log-normal: a knob gives the median, its `spread` the sigma (the 90th percentile
is the median times exp(1.28 * spread)). Where the figures are from:

    chat     Mooncake's conversation trace (6,848 requests in 2,121 s): 1.6 turns a session, first
             prompts of 5.7k tokens (median), answers of 355, 123 s between turns, 16 % of the
             next prompts differ from the last one somewhere, one block common to all.
    coding   Claude Code sessions of kv-cache-tester (23,130 requests in 29,180 s): 55 turns a
             session, 50 sessions an hour, first prompts of 24.5k tokens of which 12k (tools) are
             common to sessions of a kind, 292 new tokens a turn, answers of 212, 95 % of them
             tool calls, 16 s from a turn to the next, 183 s where a person was asked. That
             trace's prompts above 200k tokens are not made.
    agents   the mini-SWE-agent runs of lmcache-agent-trace (402 requests): 20 turns a session and
             30 at most, first prompts of 1.5k tokens, answers of 100. Those runs came one after
             another and share no system prompt; the rate, the gaps (2 s) and the system prompt
             of 1k tokens are assumed.
    rag      all assumed: a system prompt, three documents of 10,000 by Zipf's law, a question.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from tierkv.config import check_names
from tierkv.errors import ConfigError


def knob(help: str) -> Any:
    """A field with the text that its flag shows; its default is the workload's."""
    return field(metadata={"help": help})


@dataclass(slots=True, frozen=True, kw_only=True)
class Workload:
    """Knobs of the generator.

    Raises:
        ConfigError: a value is out of range.
    """

    block_size: int = knob("tokens per block")
    session_rate: float = knob("sessions that begin in a second, on average (Poisson)")
    turns: float = knob("requests of a session, on average (geometric)")
    max_turns: int = knob("requests of a session, at most")
    think_gap_s: float = knob("seconds to the next turn after an answer to a person")
    think_spread: float = knob("spread of that")
    tool_share: float = knob("share of answers that are tool calls")
    tool_gap_s: float = knob("seconds to the next turn after a tool call")
    tool_spread: float = knob("spread of that")
    num_systems: int = knob("system prompts")
    system_tokens: int = knob("tokens of each system prompt")
    num_documents: int = knob("documents that prompts may hold")
    session_documents: int = knob("documents after the system prompt of a session")
    document_tokens: float = knob("tokens of a document")
    document_spread: float = knob("spread of that")
    popularity: float = knob("the n-th most popular system prompt or document has weight 1/n**x")
    first_tokens: float = knob("tokens that a session begins with, after what it shares")
    first_spread: float = knob("spread of that")
    user_tokens: float = knob("new tokens of a person's turn")
    user_spread: float = knob("spread of that")
    result_tokens: float = knob("new tokens of a tool's result")
    result_spread: float = knob("spread of that")
    output_tokens: float = knob("tokens of an answer")
    output_spread: float = knob("spread of that")
    branch_share: float = knob("share of next turns before which an earlier text is changed")
    max_context: int = knob("tokens of prompt and answer, at most; sessions begin anew above")
    num_tenants: int = knob("tenants that sessions belong to; 0: nobody says")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            least, most = _bounds(f.name)
            if not least <= value <= most:
                raise ConfigError(f.name, value, f"must be from {least:,} to {most:,}")
        shared = self.system_tokens + 2 * self.block_size
        if self.max_context < shared:
            fix = f"must be at least {shared}: the system prompt and two blocks"
            raise ConfigError("max_context", self.max_context, fix)


_MOST = 1 << 24
_BOUNDS: dict[str, tuple[float, float]] = {
    "session_rate": (1e-6, 1e6),
    "tool_share": (0, 1),
    "branch_share": (0, 1),
    "popularity": (0, 10),
    "num_documents": (0, 1 << 20),
    "session_documents": (0, 64),
    "num_systems": (1, 1 << 20),
    "system_tokens": (0, _MOST),
    "num_tenants": (0, 1 << 20),
    "think_gap_s": (0.001, 1e6),
    "tool_gap_s": (0.001, 1e6),
}


def _bounds(name: str) -> tuple[float, float]:
    return (0, 5) if name.endswith("_spread") else _BOUNDS.get(name, (1, _MOST))


CHAT = Workload(
    block_size=64,
    session_rate=2.0,
    turns=1.56,
    max_turns=50,
    think_gap_s=123,
    think_spread=1.0,
    tool_share=0.0,
    tool_gap_s=8,
    tool_spread=1.0,
    num_systems=1,
    system_tokens=512,
    num_documents=0,
    session_documents=0,
    document_tokens=1,
    document_spread=0,
    popularity=1.0,
    first_tokens=5200,
    first_spread=1.2,
    user_tokens=60,
    user_spread=2.3,
    result_tokens=300,
    result_spread=1.0,
    output_tokens=300,
    output_spread=0.7,
    branch_share=0.16,
    max_context=131_072,
    num_tenants=0,
)

CODING = dataclasses.replace(
    CHAT,
    session_rate=50 / 3600,
    turns=55,
    max_turns=1000,
    think_gap_s=183,
    think_spread=1.7,
    tool_share=0.95,
    tool_gap_s=16,
    tool_spread=1.3,
    num_systems=100,
    system_tokens=12_000,
    first_tokens=14_000,
    first_spread=1.8,
    user_tokens=100,
    user_spread=1.8,
    result_tokens=292,
    result_spread=1.7,
    output_tokens=212,
    output_spread=1.07,
    branch_share=0.02,
    max_context=200_000,
)

AGENTS = dataclasses.replace(
    CHAT,
    block_size=16,
    session_rate=0.2,
    turns=30,
    max_turns=30,
    think_gap_s=60,
    tool_share=0.97,
    tool_gap_s=2,
    tool_spread=0.8,
    num_systems=4,
    system_tokens=1024,
    first_tokens=1500,
    first_spread=0.4,
    user_tokens=100,
    user_spread=1.0,
    result_tokens=60,
    result_spread=1.5,
    output_tokens=100,
    output_spread=0.5,
    branch_share=0.0,
    max_context=65_536,
)

RAG = dataclasses.replace(
    CHAT,
    block_size=16,
    session_rate=2.0,
    turns=1.3,
    max_turns=10,
    think_gap_s=40,
    system_tokens=400,
    num_documents=10_000,
    session_documents=3,
    document_tokens=1500,
    document_spread=0.6,
    first_tokens=40,
    first_spread=0.6,
    user_tokens=40,
    user_spread=0.6,
    output_tokens=200,
    branch_share=0.0,
    max_context=32_768,
)

WORKLOADS = {"chat": CHAT, "agents": AGENTS, "rag": RAG, "coding": CODING}


def workload_of(name: str, knobs: dict[str, Any]) -> Workload:
    """A named workload with some knobs turned.

    Raises:
        ConfigError: there is no such workload or knob, or a value is out of range.
    """
    if name not in WORKLOADS:
        raise ConfigError("workload", name, f"choose one of {', '.join(WORKLOADS)}")
    check_names(knobs, [f.name for f in dataclasses.fields(Workload)])
    return dataclasses.replace(WORKLOADS[name], **knobs)

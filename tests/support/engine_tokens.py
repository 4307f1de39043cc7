"""What a real engine generates."""

from __future__ import annotations

from tierkv.engine.core import EngineCore, EngineRequest
from tierkv.engine.sampling_params import SamplingParams


def generated(
    core: EngineCore, texts: list[list[int]], num_tokens: int, steps_between: int = 0
) -> dict[str, list[int]]:
    """Greedy tokens of each text, by its number.

    Args:
        core: an idle engine.
        texts: prompts.
        num_tokens: of each answer, whatever they are.
        steps_between: from one request to the next.
    """
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    tokens: dict[str, list[int]] = {str(number): [] for number in range(len(texts))}

    def step() -> None:
        for output in core.step():
            tokens[output.request_id] += output.new_token_ids

    for number, text in enumerate(texts):
        core.add_request(EngineRequest(str(number), text, params))
        for _ in range(steps_between):
            step()
    while core.has_work:
        step()
    assert all(len(ids) == num_tokens for ids in tokens.values())
    return tokens

"""The systems under comparison, each as a function from requests to token ids."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from common.models import model_dir
from common.workloads import Request, Sessions
from tierkv import LLM, SamplingParams
from tierkv.engine.outputs import RequestOutput

Outputs = list[list[int]]


def make_llm(model: str, **options: Any) -> LLM:
    """tierkv on one of the benchmark models, bf16, 2,048 tokens of context, 2 GiB of KV."""
    defaults: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": 2048}
    if "num_gpu_blocks" not in options:
        defaults["kv_cache_memory"] = "2GiB"
    return LLM(str(model_dir(model)), **{**defaults, **options})


def run_tierkv(llm: LLM, requests: Sequence[Request]) -> list[RequestOutput]:
    """All requests at once, greedy, exactly `num_new` tokens each; the prefix cache as it is."""
    params = [
        SamplingParams(temperature=0.0, max_tokens=r.num_new, ignore_eos=True) for r in requests
    ]
    prompts = [{"prompt_token_ids": r.prompt} for r in requests]
    return llm.generate(prompts, params, use_tqdm=False)


def token_ids(outputs: Sequence[RequestOutput]) -> Outputs:
    return [list(output.outputs[0].token_ids) for output in outputs]


def run_sessions(llm: LLM, sessions: Sessions) -> dict[str, int]:
    """Play a session tree wave by wave; returns tokens prompted, reused and generated."""
    texts: dict[int, list[int]] = {}
    totals = {"prompt_tokens": 0, "cached_tokens": 0, "new_tokens": 0}
    for wave in sessions.waves:
        requests = []
        for number in wave:
            turn = sessions.turns[number]
            before = texts[turn.parent] if turn.parent is not None else []
            requests.append(Request(before + turn.tokens, turn.num_new))
        outputs = run_tierkv(llm, requests)
        for number, request, output in zip(wave, requests, outputs, strict=True):
            new = list(output.outputs[0].token_ids)
            texts[number] = request.prompt + new
            totals["prompt_tokens"] += len(request.prompt)
            totals["cached_tokens"] += output.num_cached_tokens or 0
            totals["new_tokens"] += len(new)
    return totals


@torch.inference_mode()
def run_generate(model: PreTrainedModel, requests: Sequence[Request], batch: int = 8) -> Outputs:
    """transformers' `generate` in left-padded batches, in order of arrival.

    Every batch runs until its longest output is done, as static batching does; what a request
    did not ask for is cut off.
    """
    outputs: Outputs = []
    for first in range(0, len(requests), batch):
        group = requests[first : first + batch]
        width = max(len(r.prompt) for r in group)
        num_new = max(r.num_new for r in group)
        ids = torch.zeros(len(group), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(group):
            ids[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, width - len(request.prompt) :] = 1
        generated = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            do_sample=False,
            pad_token_id=0,
        )
        outputs.extend(
            generated[row, width : width + r.num_new].tolist() for row, r in enumerate(group)
        )
    return outputs


def run_continuous(model: PreTrainedModel, requests: Sequence[Request]) -> tuple[Outputs, float]:
    """transformers' continuous batching with an empty cache; outputs and seconds without set-up."""
    with _manager(model) as manager:
        start = time.perf_counter()
        ids = [
            manager.add_request(list(r.prompt), max_new_tokens=r.num_new, eos_token_id=-1)
            for r in requests
        ]
        done: dict[str, list[int]] = {}
        while len(done) < len(ids):
            result = manager.get_result(timeout=5)
            if result is not None and result.is_finished():
                done[result.request_id] = list(result.generated_tokens)
            elif result is None and not manager.is_running():
                raise RuntimeError("transformers' continuous batching stopped before the end")
        return [done[i] for i in ids], time.perf_counter() - start


@contextmanager
def _manager(model: PreTrainedModel) -> Iterator[Any]:
    """A running manager; the model gets its attention back afterwards."""
    attention = model.config._attn_implementation
    # On a GPU it finds out how many fit; on a CPU it does not.
    num_blocks = 128 if model.device.type == "cpu" else None
    generation = GenerationConfig(
        do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=512
    )
    try:
        with model.continuous_batching_context_manager(
            generation_config=generation,
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=num_blocks),
        ) as manager:
            yield manager
    finally:
        model.set_attn_implementation(attention)


def check_lengths(requests: Sequence[Request], outputs: Outputs) -> int:
    """The number of tokens asked for.

    Raises:
        RuntimeError: a system returned fewer or more: the comparison would be unequal work.
    """
    for number, (request, output) in enumerate(zip(requests, outputs, strict=True)):
        if len(output) != request.num_new:
            raise RuntimeError(f"request {number}: {len(output)} tokens, asked {request.num_new}")
    return sum(request.num_new for request in requests)

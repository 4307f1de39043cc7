"""Where a model can run: the CPU always, a CUDA device that fits the kernels.

Not yet run on a GPU.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import re

import torch

from tierkv.errors import ConfigError

logger = logging.getLogger(__name__)

TRITON_VERSIONS = ((3, 6), (3, 9))
"""The oldest and the newest that the kernels were compiled with."""

MIN_CAPABILITY = (8, 0)
"""Compute capability that the kernels need: bf16 tensor cores."""

FP8_CAPABILITY = (8, 9)
"""The first with fp8 tensor cores."""


def choose_device(name: str) -> torch.device:
    """The device of option `device`; `auto` is the current CUDA device where that can be used.

    Raises:
        ConfigError: cuda was asked for and cannot be used, with the reason.
    """
    if name == "cpu":
        return torch.device("cpu")
    problem = cuda_problem()
    if problem is None:
        return torch.device("cuda", torch.cuda.current_device())
    if name == "cuda":
        raise ConfigError("device", name, problem)
    return torch.device("cpu")


def cuda_problem() -> str | None:
    """What keeps CUDA from being used, and how to mend it; None where it can be."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install a CUDA build, or use cpu"
    if not torch.cuda.is_available():
        return f"no GPU can be used ({_cuda_error()}): see that nvidia-smi works, or use cpu"
    found = torch.cuda.get_device_capability()
    if found < MIN_CAPABILITY:
        wanted, has = (".".join(map(str, pair)) for pair in (MIN_CAPABILITY, found))
        gpu = torch.cuda.get_device_name()
        return f"{gpu} has compute capability {has}, the kernels need {wanted}: use cpu"
    return _triton_problem()


def _triton_problem() -> str | None:
    """Whether Triton is missing or too old; one newer than what was tried is only told of."""
    if importlib.util.find_spec("triton") is None:
        return "the kernels need Triton: pip install 'tierkv[cuda]', or use cpu"
    try:
        text = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None  # torch's nightly builds bring it under another name
    found = tuple(int(part) for part in re.findall(r"\d+", text)[:2])
    oldest, newest = TRITON_VERSIONS
    if found < oldest:
        wanted = ".".join(map(str, oldest))
        return f"Triton {text} is installed, the kernels need {wanted} or newer, or use cpu"
    if found > newest:
        logger.warning("Triton %s is newer than any that the kernels were compiled with", text)
    return None


def gib(num_bytes: int) -> str:
    """Bytes for people."""
    return f"{num_bytes / 2**30:.2f} GiB"


def free_memory(device: torch.device) -> str:
    """What a GPU has, and has left, for people."""
    free, total = torch.cuda.mem_get_info(device)
    return f"{device} has {gib(total)}, {gib(free)} of them free"


def _cuda_error() -> str:
    """Why CUDA does not start, in one line."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return (str(error).strip().splitlines() or [repr(error)])[0]
    return f"{torch.cuda.device_count()} devices are visible"

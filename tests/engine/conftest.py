"""Models that the engine's tests share, and draws as on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from text_models import save_text_model

from tierkv.engine import sampler_filters
from tierkv.kernels import ops


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny random Llama and a byte-level tokenizer."""
    return save_text_model(tmp_path_factory.mktemp("text-model"))


class InterpretedKernel:
    """A kernel that runs outside of what a test counts: its launch waits for nothing."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self.num_launches = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.num_launches += 1
            with torch._C.DisableTorchFunction():
                self._kernel[grid](*args, **options)

        return launch


@pytest.fixture
def final_draws(monkeypatch: pytest.MonkeyPatch) -> InterpretedKernel:
    """Draws of CPU tensors are final as on a GPU: the kernel for wide nuclei, interpreted."""
    if torch.cuda.is_available():
        pytest.skip("kernels are not interpreted where there is a GPU")
    import triton_steps  # noqa: F401 - repairs the interpreter

    from tierkv.kernels import cuda
    from tierkv.kernels.triton import nucleus

    kernel = InterpretedKernel(nucleus.widen)
    monkeypatch.setattr(nucleus, "widen", kernel)
    monkeypatch.setattr(ops, "_of", lambda x: cuda)
    monkeypatch.setattr(sampler_filters, "resolves_on_device", lambda device: True)
    return kernel

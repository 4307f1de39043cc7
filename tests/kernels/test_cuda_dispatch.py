"""The wrappers reach the GPU's implementations, which agree with the oracle op by op.

Where there is no GPU, tensors on the CPU are sent there and the kernels are interpreted.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from tiny_models import FAMILIES, VOCAB_SIZE, build_model
from triton_steps import DEVICE, meta_on_device, on_device

from tierkv.kernels import cuda, ops, reference
from tierkv.kernels.triton.tiles import Device
from tierkv.model.fuse import fuse_projections
from tierkv.model.swap import swap_modules, swap_rotary


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if DEVICE == "cpu":
        monkeypatch.setattr(ops, "_of", lambda x: cuda)
        monkeypatch.setattr(cuda, "_device", lambda device: Device(4, (9, 0)))
    yield


@pytest.mark.parametrize("query_lens", [[1, 1], [9, 1]])
def test_attention(query_lens, make_step, shape_type) -> None:
    step = make_step(shape_type(), query_lens, [30, 40])
    sinks = torch.randn(step.q.shape[1])
    here = on_device(step.q), on_device(step.kv), meta_on_device(step.meta)
    found = ops.paged_attention(*here, scale=0.125, sinks=sinks.to(DEVICE))
    wanted = reference.paged_attention(step.q, step.kv, step.meta, scale=0.125, sinks=sinks)
    torch.testing.assert_close(found.cpu(), wanted, atol=2e-5, rtol=2e-5)
    part = ops.partial_attention(*here, scale=0.125)
    merged, _ = ops.merge_attention([part[0]], [part[1]], sinks.to(DEVICE))
    torch.testing.assert_close(merged.cpu(), wanted, atol=2e-5, rtol=2e-5)


def test_copies(rng) -> None:
    pool = torch.randn(9, 3, 2, 2, 16, 8)
    wanted, found = pool.clone(), on_device(pool)
    src, dst = torch.tensor([0, 0, 1]), torch.tensor([4, 8, 2])
    k, v = torch.randn(2, 3, 2, 8)
    slots = torch.tensor([0, -1, 5 * 16 + 3])
    reference.write_kv(wanted[:, 1], k, v, slots)
    reference.copy_blocks(wanted, src, dst, 16)
    ops.write_kv(found[:, 1], on_device(k), on_device(v), slots.to(DEVICE))
    ops.copy_blocks(found, src.to(DEVICE), dst.to(DEVICE), 16)
    assert torch.equal(found.cpu(), wanted)


def test_gather_and_scatter(rng) -> None:
    pool = torch.randint(0, 256, (7, 4096), dtype=torch.uint8)
    ids = torch.randperm(7)[:4]
    staging = torch.zeros(5, 4096, dtype=torch.uint8, device=DEVICE)
    ops.gather_blocks(on_device(pool), ids.to(DEVICE), staging)
    assert torch.equal(staging[:4].cpu(), pool[ids]) and not staging[4].any()
    back = torch.zeros(7, 4096, dtype=torch.uint8, device=DEVICE)
    ops.scatter_blocks(staging, back, ids.to(DEVICE), num_programs=2)
    assert torch.equal(back.cpu()[ids], pool[ids]) and back.count_nonzero(1).bool().sum() == 4
    other = torch.zeros_like(back)
    ops.copy_rows(back, ids.to(DEVICE), other, ids.flip(0).to(DEVICE))
    assert torch.equal(other.cpu()[ids.flip(0)], pool[ids])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows(dtype, rng) -> None:
    x, weight = torch.randn(5, 3, 64).to(dtype), torch.randn(64)
    normed = ops.rms_norm(on_device(x), weight.to(DEVICE), 1e-6, round_first=True)
    wanted = reference.rms_norm(x, weight, 1e-6, round_first=True)
    torch.testing.assert_close(normed.cpu(), wanted)
    product = ops.act_and_mul(on_device(x), "silu")
    torch.testing.assert_close(product.cpu(), reference.act_and_mul(x, "silu"))
    cos, sin = torch.randn(2, 3, 64).to(dtype)
    turned = ops.rotate(*(on_device(y) for y in (x, x, cos, sin)))
    torch.testing.assert_close([y.cpu() for y in turned], list(reference.rotate(x, x, cos, sin)))


def test_wide_nuclei(rng) -> None:
    logits = torch.randn(3, 700)
    best = logits.amax(-1)
    mass = (logits - best[:, None]).exp().sum(-1) * 0.7
    is_open = torch.tensor([True, False, True])
    wanted, found = best.clone(), on_device(best.clone())
    reference.widen_nuclei(logits, best, mass, is_open, wanted)
    ops.widen_nuclei(*(on_device(x) for x in (logits, best, mass, is_open)), floor=found)
    weights = (logits - best[:, None]).exp()
    for row, floors in enumerate(zip(found.cpu(), wanted, strict=True)):
        masses = [weights[row][logits[row] > floor].sum() for floor in floors]
        torch.testing.assert_close(*masses, rtol=0.02, atol=0)  # a token more or less
    assert found[1] == best[1] and (found.cpu()[::2] < best[::2]).all()


def test_staging_that_does_not_fit_is_refused() -> None:
    pool = torch.zeros(4, 64, dtype=torch.uint8, device=DEVICE)
    ids = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=r"staging has shape \[2, 64\], expected 3 rows or more"):
        ops.gather_blocks(pool, ids, pool[:2])
    with pytest.raises(ValueError, match="staging has shape"):
        ops.scatter_blocks(pool[:, :32], pool, ids)
    with pytest.raises(ValueError, match="num_programs"):
        ops.gather_blocks(pool, ids, pool, num_programs=0)
    with pytest.raises(TypeError, match="ids has dtype"):
        ops.gather_blocks(pool, ids.int(), pool)


def test_a_missing_triton_is_named() -> None:
    """In a process of its own, in which Triton cannot be imported."""
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "from tierkv.kernels import ops\n"
        "try: ops._cuda()\n"
        "except ImportError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "pip install tierkv[cuda]" in run.stdout, run.stderr


def test_small_modules_of_a_model_become_kernels() -> None:
    """fp16, whose rounding the interpreter gets right."""
    half, device = torch.float16, torch.device(DEVICE)
    model = build_model(FAMILIES["llama"]()).to(device, half).eval()
    ids = torch.randint(0, VOCAB_SIZE, (1, 7), device=device)
    with torch.inference_mode():
        wanted = model(ids).logits
        assert fuse_projections(model) == 6
        assert swap_modules(model, half) == 7 + 3  # norms, MLPs
        assert swap_rotary(model, half, device) == 3
        found = model(ids).logits
    error = (found - wanted).float().norm() / wanted.float().norm()
    assert error < 2e-3

"""The step on a GPU: the CPU's numbers, the same bits after a resume, and no waiting.

`make gpu-check` runs this; MAE_DEVICE=cpu rehearses it without a GPU. Imports the core alone.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from mae_core.config import LossConfig, MaskingConfig, ModelConfig, OptimConfig
from mae_core.masking import mask_from_noise
from mae_core.model.mae import MaskedAutoencoder, build_mae
from mae_core.optim import build_optimizer
from mae_core.train_step import MicroBatch, StepMetrics, optimizer_step, pretrain_loss

pytestmark = pytest.mark.gpu

DEVICE = os.environ.get("MAE_DEVICE", "cuda")
MODEL = ModelConfig.model_validate({"encoder": "vit_micro", "img_size": 32, "patch_size": 4})
LEARNING_RATE = 1e-3


@pytest.fixture(autouse=True)
def exact_kernels() -> Iterator[None]:
    """Forbid TF32, and kernels whose sums depend on the order in which threads arrive."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(precision)


def make(device: str) -> tuple[MaskedAutoencoder, torch.optim.Optimizer]:
    torch.manual_seed(0)
    mae = build_mae(MODEL, MaskingConfig(), LossConfig()).to(device)
    return mae, build_optimizer(mae, OptimConfig(), fused=True)


def batch(step: int, device: str) -> MicroBatch:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(16, 3, 32, 32, generator=generator)
    noise = torch.rand(16, MODEL.num_patches, generator=generator)
    weights = torch.ones(16)
    weights[step % 16] = 0
    return MicroBatch(images.to(device), noise.to(device), weights.to(device))


def take(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[MicroBatch],
    dtype: torch.dtype | None = None,
) -> list[StepMetrics]:
    return [
        optimizer_step(
            model,
            optimizer,
            [one],
            pretrain_loss,
            grad_accum_steps=1,
            learning_rate=LEARNING_RATE,
            autocast_dtype=dtype,
        )
        for one in batches
    ]


def losses(metrics: list[StepMetrics]) -> list[float]:
    return [m.loss.item() for m in metrics]


def test_masks_are_the_cpus_also_where_noise_is_equal() -> None:
    noise = torch.randint(0, 20, (64, 196)).float()
    for ours, theirs in zip(
        mask_from_noise(noise.to(DEVICE), 0.75), mask_from_noise(noise, 0.75), strict=True
    ):
        assert torch.equal(ours.cpu(), theirs)


def test_four_steps_in_fp32_are_those_of_the_cpu() -> None:
    found = losses(take(*make(DEVICE), [batch(step, DEVICE) for step in range(4)]))
    expected = losses(take(*make("cpu"), [batch(step, "cpu") for step in range(4)]))
    assert found == pytest.approx(expected, rel=1e-4)


def test_bf16_stays_near_fp32() -> None:
    batches = [batch(step, DEVICE) for step in range(4)]
    found = losses(take(*make(DEVICE), batches, torch.bfloat16))
    expected = losses(take(*make(DEVICE), batches))
    assert found == pytest.approx(expected, rel=0.01)
    assert found != expected


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped() -> None:
    batches = [batch(step, DEVICE) for step in range(6)]
    whole, optimizer = make(DEVICE)
    take(whole, optimizer, batches[:3], torch.bfloat16)
    saved = {name: tensor.cpu().clone() for name, tensor in whole.state_dict().items()}
    state = torch.utils._pytree.tree_map(
        lambda x: x.cpu().clone() if isinstance(x, torch.Tensor) else x, optimizer.state_dict()
    )
    expected = losses(take(whole, optimizer, batches[3:], torch.bfloat16))

    resumed, fresh = make(DEVICE)
    resumed.load_state_dict(saved)
    fresh.load_state_dict(state)
    assert losses(take(resumed, fresh, batches[3:], torch.bfloat16)) == expected
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_an_update_that_is_not_finite_is_left_out() -> None:
    mae, optimizer = make(DEVICE)
    take(mae, optimizer, [batch(0, DEVICE)])
    before = [p.detach().clone() for p in mae.parameters()]
    poisoned = batch(1, DEVICE)
    poisoned.images[0, 0, 0, 0] = float("nan")
    (metrics,) = take(mae, optimizer, [poisoned])
    with pytest.raises(FloatingPointError, match="loss=nan"):
        metrics.check()
    assert all(torch.equal(a, b) for a, b in zip(before, mae.parameters(), strict=True))


@contextmanager
def no_waiting() -> Iterator[None]:
    """Turn every wait for the GPU into an error."""
    if DEVICE != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_does_not_wait_for_the_device() -> None:
    mae, optimizer = make(DEVICE)
    batches = [batch(step, DEVICE) for step in range(3)]
    take(mae, optimizer, batches[:1], torch.bfloat16)  # the first step makes the moments
    with no_waiting():
        metrics = take(mae, optimizer, batches[1:], torch.bfloat16)
    assert all(loss > 0 for loss in losses(metrics))


@pytest.mark.compile
def test_compiles_to_one_graph_with_the_same_loss() -> None:
    mae, _ = make(DEVICE)
    one = batch(0, DEVICE)
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(mae, fullgraph=True, dynamic=False, backend=backend)
    found = pretrain_loss(compiled, one).loss
    found.backward()
    assert found.item() == pytest.approx(pretrain_loss(mae, one).loss.item(), rel=1e-4)

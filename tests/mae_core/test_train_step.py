"""A step makes the same update for any split of the batch, including holes, or no update."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mae_core.losses import LossTerms
from mae_core.model.decoder import PixelDecoder
from mae_core.model.encoder import MaskedEncoder
from mae_core.model.mae import MAEOutput, MaskedAutoencoder
from mae_core.train_step import BatchLoss, MicroBatch, StepMetrics, optimizer_step, pretrain_loss
from mae_core.training_error import NonFiniteLossError


def make_mae() -> MaskedAutoencoder:
    torch.manual_seed(0)
    encoder = MaskedEncoder(
        img_size=(16, 32), patch_size=8, in_chans=3, embed_dim=32, depth=2, num_heads=2
    )
    decoder = PixelDecoder(
        encoder_dim=32, grid_size=(2, 4), dim=16, depth=1, num_heads=2, values_per_patch=192
    )
    return MaskedAutoencoder(encoder, decoder, patch_size=8, mask_ratio=0.75, norm_pix_floor=1e-6)


def make_batch(holes: tuple[int, ...] = ()) -> MicroBatch:
    generator = torch.Generator().manual_seed(1)
    weights = torch.ones(8)
    weights[list(holes)] = 0
    images = torch.randn(8, 3, 16, 32, generator=generator)
    return MicroBatch(images, torch.rand(8, 8, generator=generator), weights)


def split(batch: MicroBatch, num_parts: int) -> list[MicroBatch]:
    parts = zip(*(tensor.chunk(num_parts) for tensor in batch[:3]), strict=True)
    return [MicroBatch(*part) for part in parts]


def take_step(
    micro_batches: list[MicroBatch], max_grad_norm: float | None = None
) -> tuple[StepMetrics, dict[str, Tensor]]:
    """Take one step of plain gradient descent at rate 1: the update is minus the gradient."""
    mae = make_mae()
    before = {name: p.detach().clone() for name, p in mae.named_parameters()}
    metrics = optimizer_step(
        mae,
        torch.optim.SGD(mae.parameters(), lr=0.0),
        micro_batches,
        pretrain_loss,
        grad_accum_steps=len(micro_batches),
        learning_rate=1.0,
        autocast_dtype=None,
        max_grad_norm=max_grad_norm,
    )
    return metrics, {name: before[name] - p.detach() for name, p in mae.named_parameters()}


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name, gradient in second.items():
        assert torch.allclose(first[name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("holes", [(), (0, 1, 6)])
def test_any_split_into_micro_batches_gives_the_same_update(holes: tuple[int, ...]) -> None:
    batch = make_batch(holes)
    expected_metrics, expected = take_step([batch])
    for num_parts in (2, 4, 8):
        metrics, gradients = take_step(split(batch, num_parts))
        assert_close(gradients, expected)
        assert metrics.loss.item() == pytest.approx(expected_metrics.loss.item(), rel=1e-5)
        assert metrics.num_samples.item() == 8 - len(holes)
        norm = expected_metrics.grad_norm.item()
        assert metrics.grad_norm.item() == pytest.approx(norm, rel=1e-4)


def test_any_split_over_workers_gives_the_same_update() -> None:
    batch = make_batch(holes=(0, 1, 6))  # two holes for one worker, one for the other
    _, expected = take_step([batch])
    workers = [take_step(split(part, 2))[1] for part in split(batch, 2)]
    mean = {name: (workers[0][name] + workers[1][name]) / 2 for name in expected}  # as DDP
    assert_close(mean, expected)


def test_a_hole_adds_nothing_whatever_its_pixels() -> None:
    batch = make_batch(holes=(2, 5))
    images = batch.images.clone()
    images[[2, 5]] = 0
    metrics, gradients = take_step([batch])
    other_metrics, other_gradients = take_step([batch._replace(images=images)])
    assert torch.equal(metrics.loss, other_metrics.loss)
    assert_close(gradients, other_gradients)


def test_the_denominator_stays_nominal() -> None:
    batch = make_batch(holes=(4, 5, 6, 7))
    with torch.no_grad():
        losses = make_mae()(batch.images, batch.noise).loss_per_image
    metrics, _ = take_step(split(batch, 2))
    assert metrics.loss.item() == pytest.approx(losses[:4].sum().item() / 8, rel=1e-5)
    assert metrics.num_samples.item() == 4


def test_update_is_that_of_the_mean_loss() -> None:
    batch = make_batch()
    mae = make_mae()
    mae(batch.images, batch.noise).loss.backward()
    expected = {name: p.grad for name, p in mae.named_parameters() if p.grad is not None}
    metrics, gradients = take_step([batch])
    assert_close(gradients, expected)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert metrics.grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)


def test_clipping_bounds_the_update_and_reports_the_norm_before_it() -> None:
    free, _ = take_step([make_batch()])
    clipped, gradients = take_step([make_batch()], max_grad_norm=0.01)
    assert free.grad_norm.item() > 0.1
    assert clipped.grad_norm.item() == pytest.approx(free.grad_norm.item())
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


def test_all_groups_get_the_learning_rate_and_gradients_are_dropped() -> None:
    mae = make_mae()
    groups = [{"params": mae.encoder.parameters()}, {"params": mae.decoder.parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    run(mae, optimizer, [make_batch()], learning_rate=0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]
    assert all(p.grad is None for p in mae.parameters())


def run(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[MicroBatch],
    grad_accum_steps: int = 1,
    **arguments: Any,
) -> StepMetrics:
    return optimizer_step(
        model,
        optimizer,
        micro_batches,
        pretrain_loss,
        grad_accum_steps=grad_accum_steps,
        **{"learning_rate": 1.0, "autocast_dtype": None, **arguments},
    )


def test_reads_no_more_micro_batches_than_a_step_needs() -> None:
    mae = make_mae()
    stream = iter(split(make_batch(), 8))
    optimizer_step(
        mae,
        torch.optim.SGD(mae.parameters(), lr=0.0),
        stream,
        pretrain_loss,
        grad_accum_steps=3,
        learning_rate=0.0,
        autocast_dtype=None,
    )
    assert len(list(stream)) == 5


def test_too_few_micro_batches_are_an_error_and_change_nothing() -> None:
    mae = make_mae()
    before = {name: tensor.clone() for name, tensor in mae.state_dict().items()}
    optimizer = torch.optim.SGD(mae.parameters(), lr=0.0)
    with pytest.raises(ValueError, match="2 micro batches, fewer than grad_accum_steps=3"):
        run(mae, optimizer, split(make_batch(), 2), grad_accum_steps=3)
    assert all(torch.equal(before[name], tensor) for name, tensor in mae.state_dict().items())

    # What the failed step left behind does not reach the next one.
    run(mae, optimizer, [make_batch()])
    _, expected = take_step([make_batch()])
    assert_close({n: before[n] - p.detach() for n, p in mae.named_parameters()}, expected)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(poison: float) -> None:
    mae = make_mae()
    batch = make_batch()
    batch.images[3, 0, 0, 0] = poison
    before = {name: tensor.clone() for name, tensor in mae.state_dict().items()}
    optimizer = torch.optim.AdamW(mae.parameters())
    with pytest.raises(NonFiniteLossError, match="loss=nan"):
        run(mae, optimizer, split(batch, 4), grad_accum_steps=4)
    assert all(torch.equal(before[name], tensor) for name, tensor in mae.state_dict().items())
    assert not optimizer.state


def test_a_gradient_that_is_not_finite_stops_too() -> None:
    """Test a worker whose own loss is finite while another worker's is not."""
    mae = make_mae()
    mae.decoder.pred.bias.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteLossError, match=r"loss=\d.* grad_norm=(inf|nan)"):
        run(mae, torch.optim.SGD(mae.parameters(), lr=0.0), [make_batch()])


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return copies of weights, moments and step counts."""
    moments = [t for state in optimizer.state_dict()["state"].values() for t in state.values()]
    return [t.detach().clone() for t in (*model.parameters(), *moments)]


def test_a_fused_optimizer_leaves_weights_and_moments_as_they_were() -> None:
    mae, poisoned = make_mae(), make_batch()
    poisoned.images[0, 0, 0, 0] = float("nan")
    optimizer = torch.optim.AdamW(mae.parameters(), fused=True)
    run(mae, optimizer, [make_batch()], learning_rate=0.1).check()
    before = tensors_of(mae, optimizer)
    metrics = run(mae, optimizer, [poisoned], learning_rate=0.1)
    with pytest.raises(NonFiniteLossError, match="loss=nan"):
        metrics.check()
    after = tensors_of(mae, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    run(mae, optimizer, [make_batch()], learning_rate=0.1)  # the flag does not stay
    assert optimizer.state_dict()["state"][0]["step"] == 2


def test_a_floating_point_error_can_be_caught_as_such() -> None:
    assert issubclass(NonFiniteLossError, FloatingPointError)


def test_autocast_reaches_the_model_and_spares_the_loss() -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    mae = make_mae()
    mae.register_forward_hook(
        lambda _module, _inputs, output: seen.append((output.pred.dtype, output.loss.dtype))
    )
    optimizer = torch.optim.SGD(mae.parameters(), lr=0.0)
    for autocast_dtype in (None, torch.bfloat16):
        metrics = optimizer_step(
            mae,
            optimizer,
            [make_batch()],
            pretrain_loss,
            grad_accum_steps=1,
            learning_rate=0.0,
            autocast_dtype=autocast_dtype,
        )
        assert metrics.loss.dtype == torch.float32
    assert seen == [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)]
    assert all(p.dtype == torch.float32 for p in mae.parameters())


class Recorder(nn.Module):
    """Records for each forward and backward pass whether gradients would be exchanged."""

    def __init__(self, mae: MaskedAutoencoder) -> None:
        super().__init__()
        self.mae = mae
        self.syncs = True
        self.seen: list[tuple[str, bool]] = []
        mae.decoder.pred.bias.register_hook(lambda _: self.seen.append(("backward", self.syncs)))

    def forward(self, images: Tensor, noise: Tensor) -> MAEOutput:
        self.seen.append(("forward", self.syncs))
        return self.mae(images, noise)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self.syncs = False
        yield
        self.syncs = True


def test_gradients_are_exchanged_in_the_last_micro_batch_alone() -> None:
    model = Recorder(make_mae())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    run(model, optimizer, split(make_batch(), 4), grad_accum_steps=4)
    quiet = [("forward", False), ("backward", False)]
    assert model.seen == [*quiet * 3, ("forward", True), ("backward", True)]


def test_runs_under_distributed_data_parallel(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mae = make_mae()
        before = {name: p.detach().clone() for name, p in mae.named_parameters()}
        optimizer = torch.optim.SGD(mae.parameters(), lr=0.0)
        run(DistributedDataParallel(mae), optimizer, split(make_batch(), 4), grad_accum_steps=4)
    finally:
        torch.distributed.destroy_process_group()
    _, expected = take_step([make_batch()])
    assert_close({n: before[n] - p.detach() for n, p in mae.named_parameters()}, expected)


def test_each_group_learns_at_its_share_of_the_rate() -> None:
    slow, fast = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.ones_(slow.weight)
    nn.init.ones_(fast.weight)
    optimizer = torch.optim.SGD(
        [
            {"params": slow.parameters(), "lr_scale": 0.25},
            {"params": fast.parameters()},
        ],
        lr=1.0,
    )

    def loss_of(model: nn.Module, batch: torch.Tensor) -> BatchLoss:
        return BatchLoss(slow(batch).sum() + fast(batch).sum(), torch.ones(()))

    optimizer_step(
        nn.ModuleList([slow, fast]),
        optimizer,
        [torch.ones(1, 1)],
        loss_of,
        grad_accum_steps=1,
        learning_rate=0.5,
        autocast_dtype=None,
    )
    assert slow.weight.item() == pytest.approx(1 - 0.5 * 0.25)
    assert fast.weight.item() == pytest.approx(0.5)


def test_a_micro_batch_may_have_its_own_mask_ratio() -> None:
    batch = make_batch()
    _, expected = take_step([batch])
    metrics, found = take_step([batch._replace(mask_ratio=0.75)])
    assert_close(found, expected)
    other, _ = take_step([batch._replace(mask_ratio=0.5)])
    assert other.loss.item() != metrics.loss.item()


def test_the_terms_of_a_step_add_up_to_its_loss_for_any_split() -> None:
    batch = make_batch(holes=(2,))
    for num_parts in (1, 4):
        mae = make_mae()
        mae.terms = LossTerms("l1", fourier_weight=0.5, ssim_weight=0.25)
        metrics = optimizer_step(
            mae,
            torch.optim.SGD(mae.parameters(), lr=0.0),
            split(batch, num_parts),
            pretrain_loss,
            grad_accum_steps=num_parts,
            learning_rate=0.0,
            autocast_dtype=None,
        )
        assert list(metrics.terms) == ["l1", "fourier", "ssim"]
        total = sum(term.item() for term in metrics.terms.values())
        assert total == pytest.approx(metrics.loss.item(), rel=1e-5)

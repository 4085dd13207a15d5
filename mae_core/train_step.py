"""One optimizer step on one worker; the arguments hold everything it needs."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import torch
import torch.distributed
from jaxtyping import Float
from torch import Tensor, nn

from mae_core.training_error import NonFiniteLossError


class MicroBatch(NamedTuple):
    """The input of one forward pass on one worker, already on the device."""

    images: Float[Tensor, "B C H W"]  # normalised; a hole's pixels are any finite numbers
    noise: Float[Tensor, "B L"]
    weights: Float[Tensor, " B"]  # 1, or 0 for a hole: a sample that could not be read
    mask_ratio: float | None = None  # by default the model's


class BatchLoss(NamedTuple):
    """The loss of one micro batch.

    Most losses are means over images, whose nominal number every worker knows beforehand. A loss
    that is a mean over something else, such as matched places, gives its sum and their number. The
    step divides by that of the global batch, so no micro batch weighs more than another.
    """

    loss: Float[Tensor, ""]  # sum over the images that were read / their nominal number; or a sum
    num_samples: Float[Tensor, ""]  # images that were read
    divisor: Float[Tensor, ""] | None = None  # of a sum
    terms: Mapping[str, Float[Tensor, ""]] = MappingProxyType(
        {}
    )  # that `loss` adds up, to be shown


BatchT = TypeVar("BatchT")


class StepMetrics(NamedTuple):
    """What a step measured on this worker, as tensors: reading one waits for the device."""

    loss: Float[Tensor, ""]  # weighted sum over images / their nominal number, holes included
    num_samples: Float[Tensor, ""]  # sum of the weights
    grad_norm: Float[Tensor, ""]  # before clipping; over all workers under DDP
    terms: Mapping[str, Float[Tensor, ""]] = MappingProxyType({})  # of the loss, by name

    def check(self) -> None:
        """Raise a NonFiniteLossError if this step's update was left out."""
        if not torch.isfinite(self.loss + self.grad_norm):
            raise NonFiniteLossError(f"loss={self.loss.item()} grad_norm={self.grad_norm.item()}")


def pretrain_loss(model: nn.Module, batch: MicroBatch) -> BatchLoss:
    """Return the loss of a micro batch; `model` is a `MaskedAutoencoder`, bare or wrapped."""
    ratio = () if batch.mask_ratio is None else (batch.mask_ratio,)
    output = model(batch.images, batch.noise, *ratio)
    loss = (output.loss_per_image * batch.weights).sum() / len(batch.images)
    terms = {
        name: (term.detach() * batch.weights).sum() / len(batch.images)
        for name, term in output.terms.items()
    }
    return BatchLoss(loss, batch.weights.sum(), terms=terms)


def optimizer_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[BatchT],
    loss_of: Callable[[nn.Module, BatchT], BatchLoss],
    *,
    grad_accum_steps: int,
    learning_rate: float,
    autocast_dtype: torch.dtype | None,
    max_grad_norm: float | None = None,
) -> StepMetrics:
    """Forward and backward over `grad_accum_steps` batches, then clip and update.

    The loss is divided by the nominal number of images, B * grad_accum_steps, even where some are
    holes, or by the global batch's divisor if a `BatchLoss` has one. So a hole adds nothing, each
    other image has the weight 1 / global_batch_size wherever it sits, and the update is the same
    for any split of the global batch over micro batches and workers (DDP averages gradients over
    workers). Dividing by the number of images that were read would weight an image by the luck of
    its neighbours. A loss or gradient that is not finite changes nothing. A fused optimizer leaves
    the update out on the device, without waiting for it, so the caller calls `StepMetrics.check`
    before it relies on the step.

    Args:
        model: bare, or wrapped in DDP, whose gradients are then exchanged once, in the last batch.
        optimizer: each of its groups gets `learning_rate` times its `lr_scale`, if it has one.
        batches: read as far as needed; all of one size.
        loss_of: the loss of one batch; calls the model once, and is called under autocast.
        grad_accum_steps: batches in a step.
        learning_rate: of this step.
        autocast_dtype: None runs in the weights' own type.
        max_grad_norm: None leaves gradients as they are, as pretraining's reference does.

    Raises:
        NonFiniteLossError: with another optimizer, before the update; on every worker if on one.
        ValueError: `batches` ended early; nothing was updated.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)
    optimizer.zero_grad(set_to_none=True)  # a step that raised leaves gradients behind

    loss, num_samples, divisor, terms = _accumulate_gradients(
        model, batches, loss_of, grad_accum_steps=grad_accum_steps, autocast_dtype=autocast_dtype
    )
    parameters = [p for p in model.parameters() if p.grad is not None]
    if divisor is not None:
        mean_divisor = _mean_divisor(divisor, grad_accum_steps)
        loss = loss / mean_divisor
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad /= mean_divisor
    grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, grad_norm)
    metrics = StepMetrics(loss, num_samples, grad_norm, terms)
    _update(optimizer, metrics)
    optimizer.zero_grad(set_to_none=True)
    return metrics


def _update(optimizer: torch.optim.Optimizer, metrics: StepMetrics) -> None:
    """Step the optimizer if the loss is finite; one worker's NaN is in the gradients of all."""
    if not all(group.get("fused") for group in optimizer.param_groups):
        metrics.check()
        optimizer.step()
        return
    # It changes nothing where this flag on the device is set; torch's GradScaler uses it, too.
    is_left_out = ~torch.isfinite(metrics.loss + metrics.grad_norm)
    optimizer.found_inf = is_left_out.float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


def _accumulate_gradients(
    model: nn.Module,
    batches: Iterable[BatchT],
    loss_of: Callable[[nn.Module, BatchT], BatchLoss],
    *,
    grad_accum_steps: int,
    autocast_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor]]:
    """Return the loss, the number of images that were read, the sum of the divisors, the terms."""
    losses: list[Tensor] = []
    num_samples: list[Tensor] = []
    divisors: list[Tensor] = []
    terms: dict[str, Tensor] = {}
    iterator = iter(batches)
    no_sync = getattr(model, "no_sync", nullcontext)  # DDP's
    device = next(model.parameters()).device.type
    for index in range(grad_accum_steps):
        batch = next(iterator, None)
        if batch is None:
            raise ValueError(f"{index} micro batches, fewer than {grad_accum_steps=}")
        is_last = index == grad_accum_steps - 1
        with nullcontext() if is_last else no_sync():
            with torch.autocast(device, dtype=autocast_dtype, enabled=autocast_dtype is not None):
                output = loss_of(model, batch)
            loss = output.loss / grad_accum_steps
            loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
        num_samples.append(output.num_samples)
        for name, term in output.terms.items():
            share = term.detach() / grad_accum_steps
            terms[name] = share if name not in terms else terms[name] + share
        if output.divisor is not None:
            divisors.append(output.divisor)
    divisor = torch.stack(divisors).sum() if divisors else None
    return torch.stack(losses).sum(), torch.stack(num_samples).sum(), divisor, terms


def _mean_divisor(divisor: Tensor, grad_accum_steps: int) -> Tensor:
    """Return the mean divisor of the global batch's micro batches.

    The gradients are means over micro batches and workers. So divided by it, they are the sum over
    the global batch / its divisor, which is at least 1: without any matched place, the loss is that
    of the background alone, as in torchvision.
    """
    world_size = 1
    total = divisor.detach().clone()
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
        world_size = torch.distributed.get_world_size()
    return total.clamp(min=1) / (grad_accum_steps * world_size)

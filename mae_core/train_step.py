"""One optimizer step, on one worker, told everything it needs."""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn


class NonFiniteLossError(FloatingPointError):
    """The loss or the gradient is NaN or infinite; the weights are as before the step."""


class MicroBatch(NamedTuple):
    """What one worker takes through one forward pass, already on the device."""

    images: Float[Tensor, "B C H W"]  # normalised; a hole's pixels are any finite numbers
    noise: Float[Tensor, "B L"]
    weights: Float[Tensor, " B"]  # 1, or 0 for a hole: a sample that could not be read


class StepMetrics(NamedTuple):
    """What a step measured on this worker. Still tensors: reading one waits for the device."""

    loss: Float[Tensor, ""]  # weighted sum over images / their nominal number, holes included
    num_samples: Float[Tensor, ""]  # sum of the weights
    grad_norm: Float[Tensor, ""]  # before clipping; over all workers under DDP


def pretrain_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Iterable[MicroBatch],
    *,
    grad_accum_steps: int,
    learning_rate: float,
    autocast_dtype: torch.dtype | None,
    max_grad_norm: float | None = None,
) -> StepMetrics:
    """Forward and backward over `grad_accum_steps` micro batches, then clip and update.

    The loss is divided by the nominal number of images, B * grad_accum_steps, also where
    some are holes. So a hole adds nothing, each other image has the weight
    1 / global_batch_size wherever it sits, and the update is the same for any split of the
    global batch over micro batches and workers (DDP averages gradients over workers).
    Dividing by the images that were read would weight an image by the luck of its neighbours.

    Args:
        model: a `MaskedAutoencoder`, or one wrapped in DDP, whose gradients are then
            exchanged once, in the last micro batch.
        optimizer: its groups all get `learning_rate`.
        micro_batches: read as far as needed; all of one size.
        grad_accum_steps: micro batches in a step.
        learning_rate: of this step.
        autocast_dtype: None runs in the weights' own type.
        max_grad_norm: None leaves gradients as they are, as the reference does.

    Raises:
        NonFiniteLossError: before the update, and on every worker if on one.
        ValueError: `micro_batches` ended early; nothing was updated.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad(set_to_none=True)  # a step that raised leaves gradients behind

    loss, num_samples = _accumulate_gradients(
        model, micro_batches, grad_accum_steps=grad_accum_steps, autocast_dtype=autocast_dtype
    )
    parameters = [p for p in model.parameters() if p.grad is not None]
    grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    # One worker's NaN reaches the gradients of all, so all of them stop here.
    if not torch.isfinite(loss + grad_norm):
        raise NonFiniteLossError(f"loss={loss.item()} grad_norm={grad_norm.item()}")
    if max_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepMetrics(loss, num_samples, grad_norm)


def _accumulate_gradients(
    model: nn.Module,
    micro_batches: Iterable[MicroBatch],
    *,
    grad_accum_steps: int,
    autocast_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Return the loss and the number of images read."""
    losses: list[Tensor] = []
    counts: list[Tensor] = []
    iterator = iter(micro_batches)
    no_sync = getattr(model, "no_sync", nullcontext)  # DDP's
    for index in range(grad_accum_steps):
        batch = next(iterator, None)
        if batch is None:
            raise ValueError(f"{index} micro batches, fewer than {grad_accum_steps=}")
        images, noise, weights = batch
        is_last = index == grad_accum_steps - 1
        with nullcontext() if is_last else no_sync():
            with torch.autocast(
                images.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None
            ):
                output = model(images, noise)
            loss = (output.loss_per_image * weights).sum() / (len(images) * grad_accum_steps)
            loss.backward()
        losses.append(loss.detach())
        counts.append(weights.sum())
    return torch.stack(losses).sum(), torch.stack(counts).sum()

"""Activations that are computed again give the same step with less memory."""

from contextlib import nullcontext

import torch
from torch import Tensor

from mae_core.activation_checkpointing import checkpointed_activations
from mae_core.config import LossConfig, MaskingConfig, ModelConfig
from mae_core.model.family import build_encoder
from mae_core.model.mae import build_mae

CONFIG = ModelConfig(encoder="vit_nano", img_size=(16, 16), patch_size=4)


def one_step(*, is_checkpointed: bool) -> tuple[Tensor, list[Tensor], int]:
    """Return the loss, the gradients and how many numbers were kept for the backward pass."""
    torch.manual_seed(0)
    model = build_mae(CONFIG, MaskingConfig(), LossConfig())
    images = torch.rand(4, 3, 16, 16)
    kept = 0

    def count(saved: Tensor) -> Tensor:
        nonlocal kept
        kept += saved.numel()
        return saved

    context = checkpointed_activations(model) if is_checkpointed else nullcontext()
    with context, torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
        loss = model(images, torch.rand(4, 16)).loss
        kept_forward = kept
        loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return loss.detach(), gradients, kept_forward


def test_loss_and_gradients_are_the_same_to_the_bit() -> None:
    (loss, gradients, _), (again, others, _) = (
        one_step(is_checkpointed=checkpointed) for checkpointed in (False, True)
    )
    assert torch.equal(loss, again)
    assert len(gradients) == len(others)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients, others, strict=True))


def test_fewer_activations_are_kept() -> None:
    assert one_step(is_checkpointed=True)[2] < one_step(is_checkpointed=False)[2] / 2


def test_dropped_paths_are_drawn_alike_in_both_passes() -> None:
    found = []
    for context in (nullcontext, checkpointed_activations):
        torch.manual_seed(0)
        encoder = build_encoder(CONFIG, drop_path_rate=0.5).train()
        images = torch.rand(8, 3, 16, 16)
        with context(encoder):
            torch.manual_seed(1)
            encoder(images).square().mean().backward()
        found.append([p.grad for p in encoder.parameters() if p.grad is not None])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_afterwards_nothing_is_left() -> None:
    encoder = build_encoder(CONFIG)
    names = list(encoder.state_dict())
    with checkpointed_activations(encoder):
        assert all("forward" in vars(block) for block in encoder.blocks)
        assert list(encoder.state_dict()) == names
    assert not any("forward" in vars(block) for block in encoder.blocks)

"""The optimizer, and its learning rate as a pure function of the step.

Source: He et al. 2021, https://arxiv.org/abs/2111.06377, table 8, and the authors' code.
"""

import math

import torch
from torch import Tensor, nn

from mae_core.config import OptimConfig


def warmup_cosine(step: int, *, peak: float, warmup_steps: float, total_steps: float) -> float:
    """Rise linearly from 0 to `peak` at `warmup_steps`, then fall along a half cosine to 0.

    Steps count from 0, so the first optimizer step of a warm-up has a learning rate of 0,
    as in the reference. `warmup_steps` and `total_steps` may be fractions of a step: they are
    epochs times steps per epoch.
    """
    if step >= total_steps:
        return 0.0
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split what is trainable into one group with weight decay and one without.

    The reference's rule: a tensor of two or more dimensions is decayed, the class and mask
    tokens included; norms and biases are not. Frozen parameters are in neither.
    """
    decayed: list[Tensor] = []
    exempt: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_exempt = parameter.ndim <= 1 or name.endswith(".bias")
        (exempt if is_exempt else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: OptimConfig, *, fused: bool) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; each step sets its own learning rate.

    Args:
        model: already on its device.
        config: its `learning_rate` is the peak, and stands until the first step.
        fused: one kernel for the whole update.
    """
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.learning_rate,
        betas=config.betas,
        fused=fused,
    )

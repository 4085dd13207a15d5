"""The optimizer, and its learning rate as a function of the step alone.

Source: He et al. 2021, https://arxiv.org/abs/2111.06377, table 8, and the authors' code.
"""

import math
from collections.abc import Mapping

import torch
from timm.optim.lars import Lars
from torch import Tensor, nn

from mae_core.config import OptimConfig


def warmup_cosine(
    step: int, *, peak: float, warmup_steps: float, total_steps: float, floor: float = 0.0
) -> float:
    """Rise linearly from 0 to `peak` at `warmup_steps`, then fall along a half cosine to `floor`.

    Steps count from 0, so the first optimizer step of a warm-up has a learning rate of 0, as in
    the reference. `warmup_steps` and `total_steps` may be fractional, because they are epochs
    times steps per epoch.
    """
    if step >= total_steps:
        return floor
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split the trainable parameters into one group with weight decay and one without.

    Follows the reference: tensors of two or more dimensions are decayed, including the class and
    mask tokens; norms and biases are not. Frozen parameters are in neither group.
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
    """Build AdamW over `parameter_groups`; each step sets its own learning rate.

    Args:
        model: Already on its device.
        config: Its `learning_rate` is the peak, and applies until the first step.
        fused: Use one kernel for the whole update.
    """
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.learning_rate,
        betas=config.betas,
        fused=fused,
    )


def fine_tuning_groups(
    model: nn.Module, weight_decay: float, scales: Mapping[str, float]
) -> list[dict[str, object]]:
    """Group the trainable parameters by learning rate factor and by weight decay.

    Follows the reference: fine-tuning does not decay the class token, pretraining does.

    Args:
        model: Its parameters must be named as in `scales`, so pass it before wrapping it in DDP.
        weight_decay: Applied to tensors of two or more dimensions, except the class token.
        scales: The result of `layer_scales`, stored in each group as "lr_scale". Nothing in torch
            reads it: a step sets a group's "lr" to the learning rate times this.
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_exempt = parameter.ndim <= 1 or name.endswith((".bias", "cls_token"))
        key = (scales[name], 0.0 if is_exempt else weight_decay)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]


def with_head_scale(scales: Mapping[str, float], head_lr_scale: float) -> dict[str, float]:
    """Multiply the learning rate factor of every parameter that is not of `model.encoder`.

    A new head has everything to learn, and a pretrained encoder something to lose: one rate for
    both leaves the head undertrained, or spoils the encoder.
    """
    return {
        name: scale if name.startswith("encoder.") else scale * head_lr_scale
        for name, scale in scales.items()
    }


def build_lars(model: nn.Module, *, learning_rate: float) -> Lars:
    """Build LARS for a linear probe: no weight decay, and biases are not adapted.

    Source: You et al. 2017, https://arxiv.org/abs/1708.03888; momentum 0.9 and trust 0.001 as in
    He et al. 2021, table 10, and the authors' code. `learning_rate` applies until the first step.
    """
    adapted, plain = parameter_groups(model, 0.0)
    # Without always_adapt, timm's LARS is plain SGD wherever there is no weight decay.
    groups = [{**adapted, "always_adapt": True}, {**plain, "always_adapt": False}]
    return Lars(groups, lr=learning_rate, momentum=0.9, trust_coeff=0.001)

"""Name a convolutional encoder's weights as timm does, and recognise timm's.

timm's models also hold a classifier. Ours end before it: a ConvNeXt's last norm, which FCMAE does
not train either, gets the values of a new one.
"""

import torch
from torch import Tensor

from mae_core.model.conv_encoder import ConvEncoder

_LAST_NORM = "head.norm"  # of a ConvNeXt, behind timm's pooling
_PREFIX = "net."


def timm_state_dict(encoder: ConvEncoder) -> dict[str, Tensor]:
    """Return the weights under timm's names, for a model with `num_classes=0`."""
    named = {key.removeprefix(_PREFIX): value for key, value in encoder.state_dict().items()}
    if "stem.0.weight" in named:
        named[f"{_LAST_NORM}.weight"] = torch.ones(encoder.embed_dim)
        named[f"{_LAST_NORM}.bias"] = torch.zeros(encoder.embed_dim)
    return named

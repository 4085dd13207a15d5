"""Name a convolutional encoder's weights as timm does, and take over timm's.

timm's models also hold a classifier. Ours end before it: the last norm of a ConvNeXt, which FCMAE
does not train either, is left out when weights come in and has the values of a new one in those
that go out.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mae_core.config import CONV_ENCODERS, CONV_STRIDE, ModelConfig
from mae_core.interchange.declared import Declared
from mae_core.interchange.weight_files import RefusedWeightsError
from mae_core.model.conv_encoder import ConvEncoder

_LAST_NORM = "head.norm"  # of a ConvNeXt, behind timm's pooling
_PREFIX = "net."
# The first convolution, by a tensor that nothing but a ResNet or a ConvNeXt has.
_FIRST = {
    "layer1.0.conv1.weight": "conv1.weight",
    "stages.0.blocks.0.conv_dw.weight": "stem.0.weight",
}
_HEADS = ("fc.", "head.")
RESNET_STEM = 64  # channels
_SIZE = (224, 224)


class ConvWeights(NamedTuple):
    model: ModelConfig
    state: dict[str, Tensor]
    """Named as in our encoder; fp32, and whole numbers as they are."""
    notes: tuple[str, ...]


def timm_state_dict(encoder: ConvEncoder) -> dict[str, Tensor]:
    """Return the weights under timm's names, for a model with `num_classes=0`."""
    named = {key.removeprefix(_PREFIX): value for key, value in encoder.state_dict().items()}
    if "stem.0.weight" in named:
        named[f"{_LAST_NORM}.weight"] = torch.ones(encoder.embed_dim)
        named[f"{_LAST_NORM}.bias"] = torch.zeros(encoder.embed_dim)
    return named


def is_convolutional(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the weights are named as those of timm's ResNet or ConvNeXt."""
    return any(key in tensors for key in _FIRST)


def take_over_conv(tensors: Mapping[str, Tensor], declared: Declared, name: str) -> ConvWeights:
    """Name the weights of timm's ResNet or ConvNeXt V2 as ours.

    Args:
        tensors: For which `is_convolutional` is true.
        declared: What lay beside them in JSON.
        name: What the user calls the file, for messages.

    Raises:
        RefusedWeightsError: The encoder is not one of ours; names the tensor.
    """
    first = next(first for key, first in _FIRST.items() if key in tensors)
    shape = tuple(tensors[first].shape) if first in tensors else ()
    names = [x for x in CONV_ENCODERS if x.startswith("resnet") is (first == "conv1.weight")]
    widths = {x: CONV_ENCODERS[x][0] if first == "stem.0.weight" else RESNET_STEM for x in names}
    names = [x for x in names if shape[:1] == (widths[x],)]
    if len(shape) != 4 or not names:
        raise RefusedWeightsError(
            f"{name}: {first}: is {shape}, as in none of our convolutional encoders "
            f"({', '.join(CONV_ENCODERS)})"
        )
    in_chans = shape[1]
    own = {key: x for key, x in tensors.items() if not key.startswith(_HEADS)}
    candidates = {encoder: _expected(encoder, in_chans) for encoder in names}
    encoder = max(names, key=lambda name: _share_alike(own, candidates[name]))
    expected = candidates[encoder]
    fault = _first_fault(own, expected)
    if fault is not None:
        raise RefusedWeightsError(
            f"{name}: {fault}, as in {encoder}, which is the nearest of our convolutional encoders "
            f"({', '.join(CONV_ENCODERS)})"
        )
    size = declared.img_size or _SIZE
    fields = {
        "encoder": encoder,
        "img_size": _SIZE if any(side % CONV_STRIDE for side in size) else size,
        "in_chans": in_chans,
    }
    state = {}
    for key, tensor in expected.items():
        value = own[key] if key in own else torch.zeros(tensor.shape, dtype=tensor.dtype)
        state[f"{_PREFIX}{key}"] = value.float() if value.is_floating_point() else value
    is_left_out = len(own) < len(tensors)
    notes = ("The classifier, with the norm before it, is left out.",) if is_left_out else ()
    return ConvWeights(ModelConfig.model_validate(fields), state, notes)


def _share_alike(own: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    alike = [key in own and own[key].shape == x.shape for key, x in expected.items()]
    return sum(alike) / len(alike)


def _expected(encoder: str, in_chans: int) -> dict[str, Tensor]:
    """Return the tensors of our encoder without their values."""
    with torch.device("meta"):
        net = ConvEncoder(encoder, patch_size=CONV_STRIDE, in_chans=in_chans).net
    return dict(net.state_dict())


def _first_fault(own: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    for key, tensor in expected.items():
        if key not in own:
            if key.endswith("num_batches_tracked"):  # old files do not count
                continue
            return f"{key}: is missing and not {tuple(tensor.shape)}"
        if own[key].shape != tensor.shape:
            return f"{key}: is {tuple(own[key].shape)} and not {tuple(tensor.shape)}"
        if own[key].is_floating_point() != tensor.is_floating_point():
            return f"{key}: holds {str(own[key].dtype)[6:]} and not {str(tensor.dtype)[6:]}"
    unknown = [key for key in own if key not in expected]
    return f"{unknown[0]}: is there and has no place" if unknown else None

"""Take over weights from elsewhere: check them, say in words what does not fit, name them as ours.

It takes files of the MAE authors, of timm, and of Hugging Face's ViTMAE and ViT. Everything that
changes what the encoder computes is either reproduced exactly (a trained position table, the
position of the class token, layer scale, missing biases) or refused. What is left out or assumed
becomes a note.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from mae_core.checkpoint_manifest import AUTHORS_FORMAT, CorruptCheckpointError
from mae_core.config import ENCODERS, DecoderConfig, ModelConfig, ViTName
from mae_core.interchange.conv_layouts import is_convolutional, take_over_conv
from mae_core.interchange.declared import Declared
from mae_core.interchange.layouts import Layout, Named, translate
from mae_core.interchange.weight_files import RefusedWeightsError, WeightsFile
from mae_core.model.decoder import PixelDecoder
from mae_core.model.family import build_encoder
from mae_core.model.positions import sincos_positions

FORMAT_WORDS: dict[Layout, str] = {
    "fair": AUTHORS_FORMAT,
    "timm": "timm",
    "hf": "Hugging Face",
}
# Half precision rounds the fixed table; a trained one differs from it by far more.
POSITIONS_TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
AUTHORS_DECODER_DIM = 512
# Parts that turn an encoder's output into something else; what they are fed with stays the same.
HEADS = (
    "head",
    "fc_norm",
    "pre_logits",
    "classifier",
    "pooler",
    "head_dist",
    "attn_pool",
    "mask_token",
    "embeddings.mask_token",
)


class ForeignWeights(NamedTuple):
    format: str
    model: ModelConfig
    state: dict[str, Tensor]
    """Named as in a checkpoint of ours; fp32."""
    norm_pix: bool | None
    """Whether the decoder's target is normalized per patch; None: the file does not say."""
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    notes: tuple[str, ...]

    @property
    def has_decoder(self) -> bool:
        return any(name.startswith("decoder.") for name in self.state)


def import_weights(file: WeightsFile, declared: Declared, name: str) -> ForeignWeights:
    """Check a file's weights and name them as a checkpoint's.

    Args:
        file: As `read_weights_file` returns it.
        declared: What lay beside it in JSON.
        name: What the user calls the file, for messages.

    Raises:
        CorruptCheckpointError: A value is not a finite number.
        RefusedWeightsError: The encoder is not one of ours; names the tensor.
    """
    if is_convolutional(file.tensors):
        return _convolutional(file, declared, name)
    named = translate(file.tensors, name, is_wrapped=file.wrapper == "model")
    notes: list[str] = []
    for key, tensor in named.tensors.items():
        if key.startswith(("patch_embed.", "blocks.")) and not tensor.is_floating_point():
            raise RefusedWeightsError(
                f"{name}: {named.name_of(key)}: holds {str(tensor.dtype)[6:]}; quantized weights "
                "cannot be used"
            )
    tensors = {key: x for key, x in named.tensors.items() if x.is_floating_point()}
    halves = sorted({str(x.dtype)[6:] for x in tensors.values()} - {"float32"})
    if halves:
        notes.append(f"The file holds {' and '.join(halves)}; its weights become float32.")
    named = named._replace(tensors=tensors)
    encoder, model = _encoder(named, declared, name, notes)
    decoder, model = _decoder(named, declared, model, notes)
    state = {
        **{f"encoder.{key}": x for key, x in encoder.items()},
        **{f"decoder.{key}": x for key, x in decoder.items()},
    }
    state = {key: x.detach().float().contiguous() for key, x in state.items()}
    _check_finite(state, name)
    return ForeignWeights(
        FORMAT_WORDS[named.layout],
        model,
        state,
        declared.norm_pix if decoder else None,
        declared.mean,
        declared.std,
        tuple(notes),
    )


def _convolutional(file: WeightsFile, declared: Declared, name: str) -> ForeignWeights:
    found = take_over_conv(file.tensors, declared, name)
    state = {f"encoder.{key}": x.detach().contiguous() for key, x in found.state.items()}
    _check_finite(state, name)
    return ForeignWeights(
        FORMAT_WORDS["timm"], found.model, state, None, declared.mean, declared.std, found.notes
    )


def _check_finite(state: Mapping[str, Tensor], name: str) -> None:
    for key, tensor in state.items():
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise CorruptCheckpointError(
                f"{name}: {key}: {bad} of {tensor.numel()} values are NaN or infinite"
            )


def _encoder(
    named: Named, declared: Declared, name: str, notes: list[str]
) -> tuple[dict[str, Tensor], ModelConfig]:
    own = {key: x for key, x in named.tensors.items() if not _is_decoder(key)}
    patches = own.get("patch_embed.proj.weight")
    shape = () if patches is None else tuple(patches.shape)
    if len(shape) != 4 or shape[2] != shape[3] or min(shape) < 1:
        raise RefusedWeightsError(
            f"{name}: {named.name_of('patch_embed.proj.weight')}: is {shape}, not the convolution "
            "of square patches"
        )
    width, in_chans, patch_size, _ = shape
    encoder = _encoder_name(width, _depth(own), declared, name)
    _choose_norm(own, notes)
    _fold_layer_scale(own, notes)
    for i in range(ENCODERS[encoder].depth):
        if f"blocks.{i}.attn.qkv.bias" not in own:
            own[f"blocks.{i}.attn.qkv.bias"] = torch.zeros(3 * width)
            if i == 0:
                notes.append("Query, key and value have no biases: they are zero.")
    table = own.pop("pos_embed", None)
    if table is None or "cls_token" not in own:
        what = "pos_embed" if table is None else "cls_token"
        raise RefusedWeightsError(f"{name}: {what}: missing; our encoder needs it")
    grid = _grid(table, width, declared, patch_size, f"{name}: {named.name_of('pos_embed')}")
    model = ModelConfig(
        encoder=encoder,
        img_size=(grid[0] * patch_size, grid[1] * patch_size),
        patch_size=patch_size,
        in_chans=in_chans,
    )
    _check_names_and_shapes(own, named, model, name, notes)
    _place(own, table.float(), grid, named, notes)
    return own, model


def _is_decoder(key: str) -> bool:
    return key == "mask_token" or key.startswith("decoder_")


def _depth(tensors: Mapping[str, Tensor]) -> int:
    numbers = {key.split(".")[1] for key in tensors if key.startswith("blocks.")}
    return len(numbers)


def _encoder_name(width: int, depth: int, declared: Declared, name: str) -> ViTName:
    names: tuple[ViTName, ...] = get_args(ViTName)
    for encoder in names:
        shape = ENCODERS[encoder]
        if (shape.embed_dim, shape.depth) == (width, depth):
            heads = declared.num_heads
            if heads is not None and heads != shape.num_heads:
                raise RefusedWeightsError(
                    f"{name}: has {heads} attention heads; our {encoder} has {shape.num_heads}"
                )
            return encoder
    ours = ", ".join(f"{x.embed_dim}x{x.depth} ({n})" for n, x in ENCODERS.items())
    raise RefusedWeightsError(
        f"{name}: its encoder is {width} wide and {depth} blocks deep; we have {ours}"
    )


def _choose_norm(own: dict[str, Tensor], notes: list[str]) -> None:
    """Take `fc_norm` for the last norm where a model for classification has no other."""
    if "fc_norm.weight" in own and "norm.weight" not in own:
        for kind in ("weight", "bias"):
            if f"fc_norm.{kind}" in own:
                own[f"norm.{kind}"] = own.pop(f"fc_norm.{kind}")
        notes.append(
            "There is no norm, only fc_norm, which followed the mean of the patches: it is used as "
            "the norm of each token, so pooled features differ slightly from the original's."
        )


def _fold_layer_scale(own: dict[str, Tensor], notes: list[str]) -> None:
    """Multiply layer scale into the layers before it, which computes the same."""
    folded = False
    for key in [key for key in own if key.endswith((".ls1.gamma", ".ls2.gamma"))]:
        block, part, _ = key.rsplit(".", maxsplit=2)
        layer = f"{block}.{'attn.proj' if part == 'ls1' else 'mlp.fc2'}"
        weight, bias = own.get(f"{layer}.weight"), own.get(f"{layer}.bias")
        if weight is None or bias is None or own[key].shape != bias.shape:
            continue
        gamma = own.pop(key).float()
        own[f"{layer}.weight"] = weight.float() * gamma[:, None]
        own[f"{layer}.bias"] = bias.float() * gamma
        folded = True
    if folded:
        notes.append("Layer scale is multiplied into the layers before it: the same is computed.")


def _grid(
    table: Tensor, width: int, declared: Declared, patch_size: int, where: str
) -> tuple[int, int]:
    """Find rows and columns of a position table, with or without a row for the class token."""
    if table.ndim != 3 or table.shape[0] != 1 or table.shape[2] != width:
        raise RefusedWeightsError(f"{where}: is {tuple(table.shape)}, not (1, places, {width})")
    rows = table.shape[1]
    if declared.img_size is not None:
        given = (declared.img_size[0] // patch_size, declared.img_size[1] // patch_size)
        if given[0] * given[1] in (rows, rows - 1) and min(given) > 0:
            return given
    for count in (rows - 1, rows):
        side = math.isqrt(max(count, 0))
        if side and side * side == count:
            return side, side
    # Fixed embeddings say by themselves how many rows and columns they are for.
    for height in (n for n in range(1, rows) if (rows - 1) % n == 0):
        grid = (height, (rows - 1) // height)
        if _is_fixed(table[0, 1:], grid):
            return grid
    raise RefusedWeightsError(
        f"{where}: has {rows} places, which is no square of patches with or without a class token, "
        "and nothing says how many rows and columns there are"
    )


def _is_fixed(table: Tensor, grid: tuple[int, int]) -> bool:
    if table.shape[1] % 4:
        return False
    tolerance = POSITIONS_TOLERANCE.get(table.dtype, 1e-5)
    fixed = sincos_positions(grid, table.shape[1])
    return bool(torch.allclose(table.float(), fixed, rtol=0, atol=tolerance))


def _check_names_and_shapes(
    own: dict[str, Tensor], named: Named, model: ModelConfig, name: str, notes: list[str]
) -> None:
    """Compare the encoder's tensors with ours; take heads out of `own`."""
    with torch.device("meta"):
        expected = build_encoder(model).state_dict()
    left_out = [key for key in own if key not in expected and _is_head(key)]
    for key in left_out:
        del own[key]
    if left_out:
        parts = ", ".join(sorted({".".join(named.name_of(k).split(".")[:2]) for k in left_out}))
        notes.append(f"Left out, because the encoder has no such part: {parts}.")
    for key, tensor in expected.items():
        if key not in own:
            raise RefusedWeightsError(f"{name}: {named.name_of(key)}: missing")
        if own[key].shape != tensor.shape:
            raise RefusedWeightsError(
                f"{name}: {named.name_of(key)}: is {tuple(own[key].shape)}, a {model.encoder} of "
                f"ours has {tuple(tensor.shape)}"
            )
    for key in own:
        if key not in expected:
            raise RefusedWeightsError(
                f"{name}: {named.name_of(key)}: our encoder has no such part, and would compute "
                "something else without it"
            )


def _is_head(key: str) -> bool:
    return any(key == head or key.startswith((f"{head}.", f"{head}_")) for head in HEADS)


def _place(
    own: dict[str, Tensor], table: Tensor, grid: tuple[int, int], named: Named, notes: list[str]
) -> None:
    """Keep a trained position table, and add the class token's position to the token."""
    patches = table[0]
    if patches.shape[0] > grid[0] * grid[1]:
        class_row, patches = patches[:1], patches[1:]
        if class_row.any():
            own["cls_token"] = own["cls_token"].float() + class_row
            notes.append("The class token's position is added to the token: the same is computed.")
    if not _is_fixed(patches.to(named.tensors["pos_embed"].dtype), grid):
        own["positions"] = patches
        notes.append(
            f"Its positions are trained, for {grid[0]}x{grid[1]} patches: they are kept, stretched "
            "over other grids, and not trained further."
        )


def _decoder(
    named: Named, declared: Declared, model: ModelConfig, notes: list[str]
) -> tuple[dict[str, Tensor], ModelConfig]:
    """Return the decoder under our names, or nothing and a note that says why."""
    given = {
        key.removeprefix("decoder_"): x for key, x in named.tensors.items() if _is_decoder(key)
    }
    if given.keys() <= {"mask_token"}:
        notes.append("There is no decoder: further pretraining draws a fresh one.")
        return {}, model
    try:
        return _checked_decoder(given, declared, model, notes)
    except ValueError as error:  # pydantic's is one, too
        notes.append(f"Its decoder is left out, and further pretraining draws a fresh one: {error}")
        return {}, model


def _checked_decoder(
    own: dict[str, Tensor], declared: Declared, model: ModelConfig, notes: list[str]
) -> tuple[dict[str, Tensor], ModelConfig]:
    positions = own.pop("pos_embed", None)
    if "embed.weight" not in own or own["embed.weight"].ndim != 2:
        raise ValueError("decoder_embed.weight is missing")
    dim = own["embed.weight"].shape[0]
    heads = declared.decoder_heads
    if heads is None:
        heads = 16 if dim == AUTHORS_DECODER_DIM else max(dim // 32, 1)
        if dim != AUTHORS_DECODER_DIM:
            notes.append(
                f"The file does not say how many heads its decoder of {dim} has: taken to be "
                f"{heads}, each 32 wide as in the authors' decoder."
            )
    config = DecoderConfig(dim=dim, depth=max(_depth(own), 1), num_heads=heads)
    values = model.in_chans * model.patch_size**2
    with torch.device("meta"):
        expected = PixelDecoder(
            encoder_dim=model.encoder_shape.embed_dim,
            grid_size=model.grid_size,
            dim=config.dim,
            depth=config.depth,
            num_heads=config.num_heads,
            values_per_patch=values,
        ).state_dict()
    if problem := next(_differences(own, expected), None):
        raise ValueError(problem)
    if positions is None or positions.shape != (1, 1 + model.num_patches, dim):
        raise ValueError("decoder_pos_embed does not have the encoder's number of places")
    if positions[0, 0].any():
        raise ValueError("decoder_pos_embed gives the class token a position, which ours has not")
    if not _is_fixed(positions[0, 1:], model.grid_size):
        own["positions"] = positions[0, 1:]
        notes.append("Its decoder's positions are not the fixed ones: they are kept.")
    return own, model.model_copy(update={"decoder": config})


def _differences(own: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Iterator[str]:
    for key in expected.keys() | own.keys():
        if key not in own or key not in expected:
            yield f"{key} is {'missing' if key not in own else 'unknown'}"
        elif own[key].shape != expected[key].shape:
            yield f"{key} is {tuple(own[key].shape)}, expected {tuple(expected[key].shape)}"

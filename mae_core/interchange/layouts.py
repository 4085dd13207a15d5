"""Recognise whose names a weights file uses, and translate them to the MAE authors' and back.

The authors' encoder has timm's names (`blocks.0.attn.qkv.weight`); their decoder's begin with
`decoder_`. Hugging Face splits the fused query, key and value into three, and has used three
spellings of a block's place: that of the published files and transformers 4, and those that
transformers 5 reads and writes.

Sources: https://github.com/facebookresearch/mae, models_mae.py;
https://github.com/huggingface/transformers, convert_vit_mae_to_pytorch.py.
"""

import re
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mae_core.interchange.weight_files import RefusedWeightsError

Layout = Literal["fair", "timm", "hf"]
# What a wrapper around the module has put before every name.
OUTER_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "ema.")

_HF_BLOCK = {
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "mlp.fc1": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc2": "mlp.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
}
_HF_PART = {
    "attention.attention.query": "q",
    "attention.attention.key": "k",
    "attention.attention.value": "v",
    "attention.q_proj": "q",
    "attention.k_proj": "k",
    "attention.v_proj": "v",
}
_HF_OTHER = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "decoder.mask_token": "mask_token",
    "decoder.decoder_embed": "decoder_embed",
    "decoder.decoder_pos_embed": "decoder_pos_embed",
    "decoder.decoder_norm": "decoder_norm",
    "decoder.decoder_pred": "decoder_pred",
}
_HF_PLACE = re.compile(
    r"(decoder\.(?:decoder_encoder\.layers?|decoder_layers)|encoder\.layer|layers)\.(\d+)\.(.+)"
)
_HF_PATCHES = "embeddings.patch_embeddings.projection.weight"


class Named(NamedTuple):
    """Weights under the authors' names."""

    layout: Layout
    tensors: dict[str, Tensor]
    names: dict[str, str]
    """The name in the file of each tensor that has another one there."""

    def name_of(self, key: str) -> str:
        return self.names.get(key, key)


def translate(tensors: dict[str, Tensor], name: str, *, is_wrapped: bool) -> Named:
    """Translate a file's names to the authors'.

    Args:
        tensors: As read from the file.
        name: What the user calls the file, for messages.
        is_wrapped: Whether the weights lay below `model`, as in the authors' files.

    Raises:
        RefusedWeightsError: The names are those of no known layout.
    """
    bare = _without_prefix(tensors)
    if any(key.endswith(_HF_PATCHES) for key in bare):
        return _from_hf(bare, name)
    if "encoder.patch_embed.proj.weight" in bare:
        raise RefusedWeightsError(
            f"{name}: is the weights file of one of our checkpoints, without its manifest.json; "
            "give the folder that has both"
        )
    if "patch_embed.proj.weight" in bare:
        has_decoder = any(key.startswith("decoder_") for key in bare)
        return Named("fair" if has_decoder or is_wrapped else "timm", bare, {})
    shown = ", ".join(list(tensors)[:4])
    raise RefusedWeightsError(
        f"{name}: patch_embed.proj.weight: missing, so these are not the weights of a vision "
        f"transformer in the names of the MAE authors, timm, Hugging Face or this project; the "
        f"file has {shown}"
    )


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in OUTER_PREFIXES * 2:
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): x for key, x in tensors.items()}
    return tensors


def _from_hf(tensors: dict[str, Tensor], name: str) -> Named:
    found: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    parts: dict[str, dict[str, Tensor]] = {}

    def take(ours: str, theirs: str, tensor: Tensor) -> None:
        found[ours], names[ours] = tensor, theirs

    for key, tensor in tensors.items():
        bare = key.removeprefix("vit.")
        stem, _, kind = bare.rpartition(".")
        place = _HF_PLACE.fullmatch(stem)
        if bare in _HF_OTHER:
            take(_HF_OTHER[bare], key, tensor)
        elif stem in _HF_OTHER:
            take(f"{_HF_OTHER[stem]}.{kind}", key, tensor)
        elif place is None:
            take(bare, key, tensor)
        else:
            blocks = "decoder_blocks" if place[1].startswith("decoder") else "blocks"
            part = f"{blocks}.{place[2]}.{_HF_BLOCK.get(place[3], place[3])}.{kind}"
            if place[3] in _HF_PART:
                fused = f"{blocks}.{place[2]}.attn.qkv.{kind}"
                parts.setdefault(fused, {})[_HF_PART[place[3]]] = tensor
                names[fused] = f"{key} and its two neighbours"
            else:
                take(part, key, tensor)
    for fused, three in parts.items():
        if missing := {"q", "k", "v"} - three.keys():
            raise RefusedWeightsError(
                f"{name}: {names[fused]}: {', '.join(sorted(missing))} of query, key and value is "
                "missing"
            )
        if len({x.shape[1:] for x in three.values()}) > 1:
            raise RefusedWeightsError(f"{name}: {names[fused]}: their shapes do not fit together")
        found[fused] = torch.cat([three["q"], three["k"], three["v"]])
    return Named("hf", found, names)


_TO_HF_BLOCK = {ours: theirs for theirs, ours in reversed(_HF_BLOCK.items())}
_TO_HF_OTHER = {ours: theirs for theirs, ours in _HF_OTHER.items()}


def to_hf(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Translate the authors' names to those of the published Hugging Face files."""
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        stem, _, kind = key.rpartition(".")
        if key in _TO_HF_OTHER or stem in _TO_HF_OTHER:
            theirs = _TO_HF_OTHER.get(key) or f"{_TO_HF_OTHER[stem]}.{kind}"
            renamed[theirs if theirs.startswith("decoder.") else f"vit.{theirs}"] = tensor
            continue
        blocks, number, part = stem.split(".", maxsplit=2)
        half = "vit.encoder.layer" if blocks == "blocks" else "decoder.decoder_layers"
        if part == "attn.qkv":
            for word, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[f"{half}.{number}.attention.attention.{word}.{kind}"] = rows
        else:
            renamed[f"{half}.{number}.{_TO_HF_BLOCK[part]}.{kind}"] = tensor
    return renamed

"""Write weights in the formats of other projects, for `mae checkpoint convert`."""

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from infra import storage, transfers
from infra.scratch import scratch_folder
from mae_core.checkpoint import build_from_weights, save_weights
from mae_core.checkpoint_manifest import MANIFEST_FILE, CheckpointRecord
from mae_core.config import CONV_STRIDE, ModelConfig
from mae_core.interchange.conv_layouts import timm_state_dict
from mae_core.interchange.fair import fair_encoder_state_dict, fair_state_dict
from mae_core.interchange.layouts import to_hf
from mae_core.interchange.onnx_encoder import RawPixelEncoder
from mae_core.model.encoder import MaskedEncoder
from mae_core.model.mae import MaskedAutoencoder
from pipelines.outcome import ConfigError
from pipelines.training.description import read_place
from pipelines.training.init_from import Place
from pipelines.training.weights import Weights

logger = logging.getLogger(__name__)

ONNX_PACKAGES = ("onnx", "onnxscript")
ONNX_TOLERANCE = 1e-3
MAX_ONE_FILE_BYTES = 1_900_000_000  # a protobuf message must be smaller than 2 GiB
MAX_SIDE = 4096  # largest number of patches per side of an exported graph


def convert(place: Place, out: str, to: str, *, overwrite: bool) -> str:
    """Write the weights at a place to `out` and return where they lie.

    Args:
        place: Of the weights.
        out: A file or, for hf and mae, a folder; a path or an s3:// URI.
        to: mae, fair, timm, hf, safetensors or onnx.
        overwrite: Replace what lies there.

    Raises:
        ConfigError: Something lies there, or the weights do not fit the format.
        CorruptCheckpointError: They are damaged.
    """
    target = storage.absolute(out)
    if target == storage.absolute(place.uri):
        raise ConfigError(f"{out}: is the place that is converted; give another one")
    if storage.exists(target) and not overwrite:
        raise ConfigError(f"{out}: exists; give another place, or --overwrite")
    if to == "onnx":
        _check_onnx_packages()
    with scratch_folder() as workspace:
        source, made = workspace / "in", workspace / "out"
        source.mkdir()
        made.mkdir()
        weights = read_place(place, source)
        _check_has_place(weights, to)
        if to in FOLDER_WRITERS:
            FOLDER_WRITERS[to](weights, made)
            last = MANIFEST_FILE if to == "mae" else "model.safetensors"
            transfers.upload_folder(made, target, last=last)
        else:
            name = target.rpartition("/")[2]
            FILE_WRITERS[to](weights, made / name)
            folder = target.rpartition("/")[0] or "/"
            transfers.upload_folder(made, folder, last=name)
    heads = {key.partition(".")[0] for key in weights.state} - {"encoder", "decoder"}
    if heads and to != "mae":
        logger.info("left out, because the format has no place for it: %s", ", ".join(heads))
    return target


def _check_has_place(weights: Weights, to: str) -> None:
    model = weights.record.model
    if model.is_convolutional and to not in CONV_FORMATS:
        raise ConfigError(
            f"--to {to}: the format has no place for encoder={model.encoder}, but for a ViT alone; "
            f"take {' or '.join(CONV_FORMATS)}"
        )
    if model.class_tokens != 1 and to not in TOKEN_FORMATS:
        raise ConfigError(
            f"--to {to}: the format has a place for one class token, and these weights have "
            f"{model.class_tokens}; take {' or '.join(TOKEN_FORMATS)}"
        )


def _parts(weights: Weights) -> MaskedAutoencoder:
    return build_from_weights(weights.state, weights.record)


def _vit(mae: MaskedAutoencoder) -> MaskedEncoder:
    assert isinstance(mae.encoder, MaskedEncoder), "see _check_has_place"
    return mae.encoder


def _has_decoder(weights: Weights) -> bool:
    """Return whether there is a decoder of the authors' kind; tell of another."""
    if not any(key.startswith("decoder.") for key in weights.state):
        return False
    kind = weights.record.model.decoder.kind
    if kind != "transformer":
        logger.info("left out: the decoder, because the format has no place for kind=%s", kind)
    return kind == "transformer"


def _fair(weights: Weights) -> dict[str, Tensor]:
    """Return all weights under the authors' names."""
    mae = _parts(weights)
    if not _has_decoder(weights):
        return _plain(fair_encoder_state_dict(_vit(mae)))
    return _plain(fair_state_dict(mae))


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}


def _write_fair(weights: Weights, path: Path) -> None:
    torch.save({"model": _fair(weights)}, path)


def _write_timm(weights: Weights, path: Path) -> None:
    mae = _parts(weights)
    if isinstance(mae.encoder, MaskedEncoder):
        tensors = _plain(fair_encoder_state_dict(mae.encoder))
    else:
        tensors = _plain(timm_state_dict(mae.encoder))
        _tell_timm_model(weights.record.model)
    if any(key.startswith("decoder.") for key in weights.state):
        logger.info("left out: the decoder, which timm's models do not have")
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save(tensors, path)


def _tell_timm_model(model: ModelConfig) -> None:
    if model.patch_size == CONV_STRIDE:
        logger.info(
            "for timm.create_model(%r, num_classes=0, in_chans=%d)", model.encoder, model.in_chans
        )
    else:
        logger.warning(
            "timm's %s has a stride of %d, these weights of patch_size=%d: their first layers do "
            "not fit it",
            model.encoder,
            CONV_STRIDE,
            model.patch_size,
        )


def _write_safetensors(weights: Weights, path: Path) -> None:
    save_file(_fair(weights), path, metadata={"format": "pt"})


def _write_mae(weights: Weights, folder: Path) -> None:
    save_weights(folder, weights.record, weights.state)


def _write_hf(weights: Weights, folder: Path) -> None:
    record, model = weights.record, weights.record.model
    if model.img_size[0] != model.img_size[1]:
        raise ConfigError(
            f"--to hf: ViTMAE takes square images, these weights {model.img_size[0]}x"
            f"{model.img_size[1]}"
        )
    save_file(_plain(to_hf(_fair(weights))), folder / "model.safetensors", {"format": "pt"})
    _write_json(folder / "config.json", hf_config(record, has_decoder=_has_decoder(weights)))
    _write_json(folder / "preprocessor_config.json", hf_preprocessor(record))
    logger.info("ViTMAE masks images by itself: set mask_ratio=0.0 in its config to get features")


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n")


def hf_config(record: CheckpointRecord, *, has_decoder: bool) -> dict[str, Any]:
    model, shape, decoder = record.model, record.model.encoder_shape, record.model.decoder
    return {
        "architectures": ["ViTMAEForPreTraining" if has_decoder else "ViTMAEModel"],
        "model_type": "vit_mae",
        "hidden_size": shape.embed_dim,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.num_heads,
        "intermediate_size": 4 * shape.embed_dim,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "image_size": model.img_size[0],
        "patch_size": model.patch_size,
        "num_channels": model.in_chans,
        "decoder_hidden_size": decoder.dim,
        "decoder_num_hidden_layers": decoder.depth,
        "decoder_num_attention_heads": decoder.num_heads,
        "decoder_intermediate_size": 4 * decoder.dim,
        "mask_ratio": record.masking.last_ratio,
        "norm_pix_loss": record.loss.norm_pix,
    }


def hf_preprocessor(record: CheckpointRecord) -> dict[str, Any]:
    height, width = record.model.img_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(record.channel_mean),
        "image_std": list(record.channel_std),
    }


def _check_onnx_packages() -> None:
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--to onnx needs {' and '.join(missing)}: pip install 'mae-pipeline[onnx]'"
        )


def _write_onnx(weights: Weights, path: Path) -> None:
    """Export the encoder from raw pixels on, and compare it with torch at two sizes."""
    record, model = weights.record, weights.record.model
    encoder = _vit(_parts(weights))
    module = RawPixelEncoder(encoder, record.channel_mean, record.channel_std).eval()
    patch, (height, width) = model.patch_size, model.img_size
    rows, columns = (torch.export.Dim(n, min=1, max=MAX_SIDE) for n in ("rows", "columns"))
    sizes = {0: torch.export.Dim("batch"), 2: patch * rows, 3: patch * columns}
    num_bytes = sum(tensor.numel() * 4 for tensor in weights.state.values())
    # Two rows and columns, because the exporter would take a single one for a constant.
    example = _pixels(2, model.in_chans, max(height, 2 * patch), max(width, 3 * patch))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (example,),
            path,
            input_names=["pixels"],
            output_names=["tokens", "features"],
            dynamic_shapes={"pixels": sizes},
            dynamo=True,
            external_data=num_bytes > MAX_ONE_FILE_BYTES,
            verbose=False,
        )
    logger.info(
        "ONNX: pixels (uint8, batch x %d x height x width, sides that are multiples of %d) to "
        "tokens and features (the mean of the patches' tokens)",
        model.in_chans,
        patch,
    )
    _compare(module, path, [example, _pixels(1, model.in_chans, 2 * patch, 4 * patch)])


def _pixels(*shape: int) -> Tensor:
    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def _compare(module: nn.Module, path: Path, examples: list[Tensor]) -> None:
    if importlib.util.find_spec("onnxruntime") is None:
        logger.warning("not compared with torch: onnxruntime is not installed")
        return
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for pixels in examples:
        with torch.no_grad():
            expected = module(pixels)
        found = session.run(None, {"pixels": pixels.numpy()})
        pairs = zip(found, expected, strict=True)
        worst = max([worst, *(float((torch.from_numpy(a) - b).abs().max()) for a, b in pairs)])
    if worst > ONNX_TOLERANCE:
        raise ConfigError(f"--to onnx: the result differs from torch's by {worst:.1e}; not written")
    logger.info("compared with torch at %d sizes: largest difference %.1e", len(examples), worst)


CONV_FORMATS = ("mae", "timm")  # that hold a convolutional encoder
TOKEN_FORMATS = ("mae", "onnx")  # that hold several class tokens
FOLDER_WRITERS: dict[str, Callable[[Weights, Path], None]] = {"hf": _write_hf, "mae": _write_mae}
FILE_WRITERS: dict[str, Callable[[Weights, Path], None]] = {
    "fair": _write_fair,
    "timm": _write_timm,
    "safetensors": _write_safetensors,
    "onnx": _write_onnx,
}

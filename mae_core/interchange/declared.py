"""Read what the JSON files beside weights say: Hugging Face's and timm's config.json."""

from pathlib import Path
from typing import Any, NamedTuple

from mae_core.checkpoint_manifest import CorruptCheckpointError, read_json_object
from mae_core.interchange.weight_files import RefusedWeightsError

CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
MAX_JSON_BYTES = 1 << 20
HF_TYPES = ("vit_mae", "vit")


class Declared(NamedTuple):
    """What a file of weights alone does not say; None where nothing else says it, either."""

    img_size: tuple[int, int] | None = None
    num_heads: int | None = None
    decoder_heads: int | None = None
    norm_pix: bool | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def read_declared(folder: Path, name: str) -> Declared:
    """Read the JSON files of a folder of weights.

    Raises:
        CorruptCheckpointError: One of them is damaged.
        RefusedWeightsError: They describe a model that is not a plain vision transformer.
    """
    config = _read_object(folder / CONFIG_FILE, f"{name}/{CONFIG_FILE}")
    if "pretrained_cfg" in config or "architecture" in config:
        return _of_timm(config, f"{name}/{CONFIG_FILE}")
    where = f"{name}/{CONFIG_FILE}"
    kind = config.get("model_type")
    if kind not in HF_TYPES:
        raise RefusedWeightsError(
            f"{where}: model_type is {kind!r}; read are {' and '.join(HF_TYPES)}, and timm's"
        )
    if config.get("hidden_act", "gelu") != "gelu":
        raise RefusedWeightsError(f"{where}: hidden_act is {config['hidden_act']!r}, ours is gelu")
    preprocessor = _read_object(folder / PREPROCESSOR_FILE, f"{name}/{PREPROCESSOR_FILE}")
    norm_pix = config.get("norm_pix_loss")
    return Declared(
        img_size=_size(config.get("image_size")),
        num_heads=_whole(config.get("num_attention_heads")),
        decoder_heads=_whole(config.get("decoder_num_attention_heads")),
        norm_pix=norm_pix if isinstance(norm_pix, bool) else None,
        mean=_numbers(preprocessor.get("image_mean"), f"{name}/{PREPROCESSOR_FILE}: image_mean"),
        std=_numbers(preprocessor.get("image_std"), f"{name}/{PREPROCESSOR_FILE}: image_std"),
    )


def _of_timm(config: dict[str, Any], where: str) -> Declared:
    inner = config.get("pretrained_cfg", config)
    inner = inner if isinstance(inner, dict) else {}
    size = inner.get("input_size")
    return Declared(
        img_size=_size(size[1:]) if isinstance(size, list) and len(size) == 3 else None,
        mean=_numbers(inner.get("mean"), f"{where}: mean"),
        std=_numbers(inner.get("std"), f"{where}: std"),
    )


def _read_object(path: Path, name: str) -> dict[str, Any]:
    """Read a JSON file; a file that is not there says nothing."""
    if not path.exists():
        return {}
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CorruptCheckpointError(f"{name}: is larger than {MAX_JSON_BYTES} bytes")
    return read_json_object(path, name)


def _whole(raw: object) -> int | None:
    return raw if isinstance(raw, int) and not isinstance(raw, bool) and raw > 0 else None


def _size(raw: object) -> tuple[int, int] | None:
    sides = [_whole(side) for side in (raw if isinstance(raw, list) else [raw, raw])]
    if len(sides) != 2 or sides[0] is None or sides[1] is None:
        return None
    return sides[0], sides[1]


def _numbers(raw: object, where: str) -> tuple[float, ...] | None:
    if raw is None:
        return None
    if not isinstance(raw, list) or not raw or not all(isinstance(x, int | float) for x in raw):
        raise RefusedWeightsError(f"{where}: is {raw!r}, not a list of numbers")
    return tuple(float(x) for x in raw)

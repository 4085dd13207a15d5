"""What the JSON files beside weights say."""

import json
from pathlib import Path
from typing import Any

import pytest

from mae_core.checkpoint_manifest import CorruptCheckpointError
from mae_core.interchange.declared import Declared, read_declared
from mae_core.interchange.weight_files import RefusedWeightsError


def write(folder: Path, config: Any, preprocessor: Any = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def test_hugging_face_says_heads_target_and_statistics(tmp_path: Path) -> None:
    config = {
        "model_type": "vit_mae",
        "image_size": 224,
        "num_attention_heads": 12,
        "decoder_num_attention_heads": 16,
        "norm_pix_loss": True,
    }
    statistics = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}
    assert read_declared(write(tmp_path, config, statistics), "x") == Declared(
        img_size=(224, 224),
        num_heads=12,
        decoder_heads=16,
        norm_pix=True,
        mean=(0.5, 0.4, 0.3),
        std=(0.1, 0.2, 0.3),
    )


def test_timm_says_size_and_statistics(tmp_path: Path) -> None:
    config = {
        "architecture": "vit_base_patch16_224",
        "pretrained_cfg": {"input_size": [3, 224, 448], "mean": [0.5] * 3, "std": [0.25] * 3},
    }
    assert read_declared(write(tmp_path, config), "x") == Declared(
        img_size=(224, 448), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "swin"}, "x/config.json: model_type is 'swin'"),
        ({"model_type": "vit", "hidden_act": "relu"}, "hidden_act is 'relu', ours is gelu"),
        ({"architecture": "a", "pretrained_cfg": {"mean": "half"}}, "mean: is 'half'"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(RefusedWeightsError, match=message):
        read_declared(write(tmp_path, config), "x")


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not JSON"), ("[]", "not a JSON object"), (" " * 2_000_000, "larg")]
)
def test_damaged_json_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CorruptCheckpointError, match=rf"x/config.json: .*{message}"):
        read_declared(tmp_path, "x")

"""Weights written in another layout compute the same there; timm, transformers and onnxruntime."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from transformers import ViTMAEForPreTraining, ViTMAEModel

from mae_core.checkpoint import build_from_weights, load_encoder, save_weights
from mae_core.checkpoint_manifest import CheckpointRecord
from mae_core.config import DecoderConfig, LossConfig, MaskingConfig, ModelConfig
from mae_core.model.mae import MaskedAutoencoder, build_mae
from pipelines.outcome import ConfigError
from pipelines.training import conversion
from pipelines.training.conversion import convert
from pipelines.training.init_from import Place, locate
from pipelines.training.weights import read_checkpoint


def write(
    folder: Path, *, has_decoder: bool = True, img_size: tuple[int, int] = (32, 32)
) -> MaskedAutoencoder:
    """Write a checkpoint with a trained position table, and return its model."""
    torch.manual_seed(0)
    record = CheckpointRecord(
        step=3,
        samples_seen=3,
        epoch=1,
        total_steps=3,
        seed=0,
        data_digest="d",
        channel_mean=(0.4, 0.5, 0.6),
        channel_std=(0.2, 0.3, 0.4),
        model=ModelConfig(
            encoder="vit_micro",
            img_size=img_size,
            patch_size=8,
            decoder=DecoderConfig(dim=64, depth=1, num_heads=4),
        ),
        masking=MaskingConfig(),
        loss=LossConfig(norm_pix=False),
    )
    mae = build_mae(record.model, record.masking, record.loss)
    grid = mae.encoder.grid_size
    mae.encoder.use_positions(torch.randn(grid[0] * grid[1], 192), grid)
    kept = {k: x for k, x in mae.state_dict().items() if has_decoder or k.startswith("encoder.")}
    save_weights(folder, record, {**kept, "head.weight": torch.zeros(2, 192)})
    return mae.eval()


def write_convolutional(folder: Path, encoder: str, **changes: Any) -> MaskedAutoencoder:
    """Write a checkpoint with a deconvolution decoder, and return its model."""
    torch.manual_seed(0)
    fields = {"encoder": encoder, "img_size": [32, 64], **changes}
    record = CheckpointRecord(
        step=3,
        samples_seen=3,
        epoch=1,
        total_steps=3,
        seed=0,
        data_digest="d",
        channel_mean=(0.4, 0.5, 0.6),
        channel_std=(0.2, 0.3, 0.4),
        model=ModelConfig.model_validate(
            {**fields, "decoder": {"kind": "deconvolution", "dim": 32}}
        ),
        masking=MaskingConfig(mask_ratio=0.5),
        loss=LossConfig(),
    )
    mae = build_mae(record.model, record.masking, record.loss)
    save_weights(folder, record, mae.state_dict())
    return mae.eval()


def place(folder: Path) -> Place:
    return locate(str(folder), "unused")


def images_and_noise() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 3, 32, 32), torch.rand(2, 16)


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_timm_loads_what_is_written_for_it(tmp_path: Path, name: str) -> None:
    mae = write(tmp_path / "own")
    convert(place(tmp_path / "own"), str(tmp_path / name), "timm", overwrite=False)
    vit = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=192, depth=6, num_heads=3, num_classes=0
    ).eval()
    file = tmp_path / name
    vit.load_state_dict(load_file(file) if name != "a.pth" else torch.load(file, weights_only=True))
    images, _ = images_and_noise()
    with torch.no_grad():
        assert (vit.forward_features(images) - mae.encoder(images)).abs().max() <= 1e-4


@pytest.mark.parametrize("has_decoder", [True, False])
def test_transformers_loads_the_folder_that_is_written_for_it(
    tmp_path: Path, has_decoder: bool
) -> None:
    mae = write(tmp_path / "own", has_decoder=has_decoder)
    convert(place(tmp_path / "own"), str(tmp_path / "hf"), "hf", overwrite=False)
    kind = ViTMAEForPreTraining if has_decoder else ViTMAEModel
    theirs, told = kind.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    images, noise = images_and_noise()
    with torch.no_grad():
        expected = mae(images, noise)
        found = theirs.eval()(images, noise=noise)
        if has_decoder:
            logits = found.logits[torch.arange(len(images))[:, None], expected.ids_removed]
            assert (logits - expected.pred).abs().max() <= 1e-4
            assert abs(found.loss - expected.loss) <= 1e-4  # raw pixels, as in the config
    preprocessor = json.loads((tmp_path / "hf/preprocessor_config.json").read_text())
    assert preprocessor["image_mean"] == [0.4, 0.5, 0.6]


@pytest.mark.parametrize("to", ["fair", "safetensors", "hf", "mae"])
def test_what_is_written_comes_back_bit_for_bit(tmp_path: Path, to: str) -> None:
    mae = write(tmp_path / "own")
    convert(place(tmp_path / "own"), str(tmp_path / "out"), to, overwrite=False)
    convert(place(tmp_path / "out"), str(tmp_path / "back"), "mae", overwrite=False)
    back = read_checkpoint(str(tmp_path / "back"), tmp_path / "fetched")
    again = build_from_weights(back.state, back.record).state_dict()
    assert again.keys() == mae.state_dict().keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in mae.state_dict().items())


def test_onnx_takes_raw_pixels_of_any_batch_and_size(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    write(tmp_path / "own", img_size=(16, 32))
    convert(place(tmp_path / "own"), str(tmp_path / "a.onnx"), "onnx", overwrite=False)
    assert "compared with torch at 2 sizes: largest difference" in caplog.text
    assert [file.name for file in tmp_path.glob("a.onnx*")] == ["a.onnx"]
    session = onnxruntime.InferenceSession(
        str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"]
    )
    encoder = load_encoder(tmp_path / "own")[0].eval()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    for batch, height, width in ((1, 16, 32), (3, 32, 32), (1, 8, 72)):
        pixels = np.random.default_rng(0).integers(0, 256, (batch, 3, height, width), np.uint8)
        tokens, features = session.run(None, {"pixels": pixels})
        with torch.no_grad():
            expected = encoder((torch.from_numpy(pixels) / 255 - mean) / std)
        assert np.abs(tokens - expected.numpy()).max() <= 1e-4
        assert np.abs(features - expected[:, 1:].mean(1).numpy()).max() <= 1e-4


def test_onnx_without_its_packages_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "own")
    monkeypatch.setattr(conversion.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs onnx and onnxscript: pip install 'mae-pipeline"):
        convert(place(tmp_path / "own"), str(tmp_path / "a.onnx"), "onnx", overwrite=False)


def test_nothing_is_overwritten_unless_it_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "own")
    (tmp_path / "a.pth").write_text("mine")
    with pytest.raises(ConfigError, match=r"a.pth: exists; give another place, or --overwrite"):
        convert(place(tmp_path / "own"), str(tmp_path / "a.pth"), "fair", overwrite=False)
    assert (tmp_path / "a.pth").read_text() == "mine"
    convert(place(tmp_path / "own"), str(tmp_path / "a.pth"), "fair", overwrite=True)
    assert locate(str(tmp_path / "a.pth"), "unused").files is not None
    with pytest.raises(ConfigError, match=r"is the place that is converted"):
        convert(place(tmp_path / "a.pth"), str(tmp_path / "a.pth"), "timm", overwrite=True)


def test_what_a_format_cannot_hold_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    write(tmp_path / "own")
    convert(place(tmp_path / "own"), str(tmp_path / "a.pth"), "timm", overwrite=False)
    assert "left out: the decoder" in caplog.text
    assert "left out, because the format has no place for it: head" in caplog.text
    write(tmp_path / "wide", img_size=(16, 32))
    with pytest.raises(ConfigError, match=r"--to hf: ViTMAE takes square images, .* 16x32"):
        convert(place(tmp_path / "wide"), str(tmp_path / "hf"), "hf", overwrite=False)


@pytest.mark.parametrize("name", ["resnet18", "convnextv2_atto"])
def test_timm_loads_a_convolutional_encoder_and_other_formats_refuse_it(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    mae = write_convolutional(tmp_path / "own", name, patch_size=32)
    file = tmp_path / "a.pth"
    convert(place(tmp_path / "own"), str(file), "timm", overwrite=False)
    theirs = timm.create_model(name, num_classes=0).eval()
    theirs.load_state_dict(torch.load(file, weights_only=True))
    images = torch.randn(2, 3, 32, 64)
    assert torch.equal(theirs.forward_features(images), mae.encoder.feature_map(images))
    assert f"for timm.create_model('{name}', num_classes=0, in_chans=3)" in caplog.text
    for to in ("fair", "hf", "safetensors", "onnx"):
        told = rf"--to {to}: the format has no place for encoder={name}, .* take mae or timm"
        with pytest.raises(ConfigError, match=told):
            convert(place(tmp_path / "own"), str(tmp_path / "b"), to, overwrite=False)
    convert(place(tmp_path / "own"), str(tmp_path / "copy"), "mae", overwrite=False)
    assert torch.equal(load_encoder(tmp_path / "copy")[0].eval()(images), mae.encoder(images))


def test_a_stride_that_timms_model_has_not_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_convolutional(tmp_path / "own", "convnextv2_atto", patch_size=8)
    convert(place(tmp_path / "own"), str(tmp_path / "a.pth"), "timm", overwrite=False)
    assert "timm's convnextv2_atto has a stride of 32, these weights of patch_size=8" in caplog.text


@pytest.mark.parametrize("to", ["timm", "fair", "hf", "safetensors"])
def test_a_format_with_one_class_token_refuses_several(tmp_path: Path, to: str) -> None:
    write_convolutional(tmp_path / "own", "vit_nano", patch_size=8, class_tokens=3)
    with pytest.raises(ConfigError, match=rf"--to {to}: the format has a place for one class tok"):
        convert(place(tmp_path / "own"), str(tmp_path / "a.pth"), to, overwrite=False)


def test_a_vit_with_another_decoder_goes_out_without_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    write_convolutional(tmp_path / "own", "vit_nano", patch_size=8)
    convert(place(tmp_path / "own"), str(tmp_path / "a.pth"), "fair", overwrite=False)
    keys = torch.load(tmp_path / "a.pth", weights_only=True)["model"]
    assert "cls_token" in keys
    assert [key for key in keys if key.startswith("decoder")] == []
    assert "left out: the decoder, because the format has no place for kind=deconv" in caplog.text

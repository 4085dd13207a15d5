"""Hugging Face's names, in each of their spellings; transformers is the other side."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining

from mae_core.interchange.declared import Declared
from mae_core.interchange.fair import fair_state_dict
from mae_core.interchange.foreign import import_weights
from mae_core.interchange.layouts import to_hf, translate
from mae_core.interchange.weight_files import RefusedWeightsError, WeightsFile
from tests.mae_core.test_foreign import as_encoder, make_mae
from tests.mae_core.test_parity import to_transformers


def make_theirs() -> ViTMAEForPreTraining:
    torch.manual_seed(0)
    return ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=192,
            num_hidden_layers=6,
            num_attention_heads=3,
            intermediate_size=768,
            image_size=32,
            patch_size=8,
            decoder_hidden_size=64,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=256,
            layer_norm_eps=1e-6,
        )
    ).eval()


def saved(model: ViTMAEForPreTraining, folder: Path) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def test_a_saved_vit_mae_is_read_and_computes_the_same(tmp_path: Path) -> None:
    theirs = make_theirs()
    file = WeightsFile(saved(theirs, tmp_path / "theirs"), "safetensors", None)
    found = import_weights(file, Declared(decoder_heads=2), "theirs")
    assert found.format == "Hugging Face"
    assert found.has_decoder
    assert found.model.decoder.dim == 64
    encoder = as_encoder(found, tmp_path / "ours")
    images, noise = torch.randn(2, 3, 32, 32), torch.linspace(0, 1, 16).expand(2, -1)
    theirs.config.mask_ratio = 0.0
    with torch.no_grad():
        expected = theirs.vit(images, noise=noise).last_hidden_state
        assert (encoder(images) - expected).abs().max() <= 1e-4


def test_what_we_write_is_read_by_transformers(tmp_path: Path) -> None:
    mae = make_mae()
    theirs = make_theirs()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(to_hf(fair_state_dict(mae)), tmp_path / "pytorch_model.bin")
    read, told = ViTMAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    with torch.no_grad():
        expected = mae(images, noise)
        logits = read.eval()(images, noise=noise).logits
    logits = logits[torch.arange(len(images))[:, None], expected.ids_removed]
    assert (logits - expected.pred).abs().max() <= 1e-4
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "vit_mae"


@pytest.mark.parametrize("spelling", [to_hf, to_transformers])
def test_each_spelling_comes_back_to_the_same_tensors(spelling: object) -> None:
    fair = fair_state_dict(make_mae())
    assert callable(spelling)
    found = translate(spelling(fair), "x", is_wrapped=False)
    assert found.layout == "hf"
    assert found.tensors.keys() == fair.keys()
    assert all(torch.equal(found.tensors[key], fair[key]) for key in fair)


def test_a_classifier_of_hugging_face_loses_its_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=32,
        patch_size=8,
        layer_norm_eps=1e-6,
    )
    theirs = ViTForImageClassification(config).eval()
    file = WeightsFile(theirs.state_dict(), "torch", None)
    found = import_weights(file, Declared(), "theirs")
    assert any("classifier.bias, classifier.weight" in note for note in found.notes)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = theirs.vit(images).last_hidden_state
        assert (as_encoder(found, tmp_path)(images) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.model.", "_orig_mod."])
def test_a_wrappers_prefix_is_taken_off(prefix: str) -> None:
    fair = fair_state_dict(make_mae())
    found = translate({f"{prefix}{k}": x for k, x in fair.items()}, "x", is_wrapped=False)
    assert found.layout == "fair"
    assert found.tensors.keys() == fair.keys()


def test_a_lone_query_is_named() -> None:
    weights = to_hf(fair_state_dict(make_mae()))
    del weights["vit.encoder.layer.4.attention.attention.key.bias"]
    with pytest.raises(RefusedWeightsError, match=r"x: vit.encoder.layer.4.* k of query, key"):
        translate(weights, "x", is_wrapped=False)

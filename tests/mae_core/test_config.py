import math
from typing import Any

import pytest
from pydantic import ValidationError

from mae_core.config import (
    ENCODERS,
    DecoderConfig,
    MaskingConfig,
    ModelConfig,
    OptimConfig,
    StrictConfig,
    as_square,
)


class Example(StrictConfig):
    width: int = 1
    rate: float = 0.5
    """Share of something."""


@pytest.mark.parametrize(
    "values", [{"widht": 2}, {"width": "two"}, {"rate": math.nan}, {"rate": math.inf}]
)
def test_a_config_refuses_what_it_does_not_know(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(values))):
        Example(**values)


def test_a_config_does_not_change_and_its_docstrings_are_its_help() -> None:
    config = Example()
    with pytest.raises(ValidationError, match="frozen"):
        config.width = 2  # type: ignore[misc]
    assert Example.model_fields["rate"].description == "Share of something."


@pytest.mark.parametrize(
    ("raw", "sides"),
    [
        (224, (224, 224)),
        ([224], (224, 224)),
        ((96,), (96, 96)),
        ([240, 320], [240, 320]),
        (True, True),
        ("224", "224"),
        ([], []),
    ],
)
def test_one_number_is_both_sides(raw: object, sides: object) -> None:
    assert as_square(raw) == sides


def test_the_grid_has_rows_and_columns_of_patches() -> None:
    model = ModelConfig(img_size=(96, 160), patch_size=16)
    assert model.grid_size == (6, 10)
    assert model.num_patches == 60
    assert ModelConfig(img_size=224).num_patches == 196  # type: ignore[arg-type]


def test_an_image_that_patches_do_not_tile_is_refused() -> None:
    with pytest.raises(ValidationError, match="img_size=96x100 is not a multiple of patch_size=16"):
        ModelConfig(img_size=(96, 100), patch_size=16)


def test_the_heads_of_every_model_divide_its_width() -> None:
    with pytest.raises(ValidationError, match="num_heads=5 does not divide dim=96"):
        DecoderConfig(dim=96, num_heads=5)
    assert [n for n, shape in ENCODERS.items() if shape.embed_dim % shape.num_heads] == []
    assert ENCODERS["vit_base"] == (768, 12, 12)


@pytest.mark.parametrize(
    ("encoder", "decoder", "shape"),
    [
        ("vit_base", {}, (512, 8, 16)),
        ("vit_large", {"dim": 256}, (256, 8, 16)),
        ("vit_micro", {}, (96, 2, 3)),
        ("vit_tiny", {}, (192, 4, 6)),
        ("vit_small", {}, (256, 4, 8)),
        ("vit_micro", {"depth": 4}, (96, 4, 3)),
        ("vit_micro", {"dim": 192}, (192, 2, 3)),
        ("vit_micro", {"dim": 128}, (128, 2, 4)),  # 3 heads do not divide it
        ("vit_micro", {"dim": 100}, (100, 2, 2)),
        ("vit_micro", {"dim": 8}, (8, 2, 1)),
        ("vit_micro", {"dim": 512, "depth": 8, "num_heads": 16}, (512, 8, 16)),
    ],
)
def test_a_small_encoder_has_a_small_decoder_unless_one_is_given(
    encoder: str, decoder: dict[str, int], shape: tuple[int, int, int]
) -> None:
    fields = {"encoder": encoder, **({"decoder": decoder} if decoder else {})}
    found = ModelConfig.model_validate(fields).decoder
    assert (found.dim, found.depth, found.num_heads) == shape


def test_a_decoder_that_is_given_as_a_whole_stays() -> None:
    model = ModelConfig(encoder="vit_micro", decoder=DecoderConfig())
    assert model.decoder == DecoderConfig(dim=512, depth=8, num_heads=16)
    assert ModelConfig.model_validate(model.model_dump(mode="json")) == model


def test_a_mistake_in_a_decoder_is_still_named() -> None:
    with pytest.raises(ValidationError, match=r"num_heads=5 does not divide dim=96"):
        ModelConfig.model_validate({"encoder": "vit_micro", "decoder": {"num_heads": 5}})
    with pytest.raises(ValidationError, match=r"decoder\.widht"):
        ModelConfig.model_validate({"encoder": "vit_micro", "decoder": {"widht": 5}})


@pytest.mark.parametrize(
    ("fields", "patch_size", "decoder"),
    [
        ({"encoder": "resnet18"}, 32, ("deconvolution", 256, 1)),
        ({"encoder": "resnet50"}, 32, ("deconvolution", 512, 1)),
        ({"encoder": "convnextv2_base"}, 32, ("deconvolution", 512, 1)),
        ({"encoder": "convnextv2_atto", "patch_size": 8}, 8, ("deconvolution", 192, 1)),
        ({"encoder": "convnextv2_atto", "decoder": {"dim": 64}}, 32, ("deconvolution", 64, 1)),
        ({"encoder": "resnet18", "decoder": {"kind": "transformer"}}, 32, ("transformer", 256, 4)),
        ({"encoder": "resnet50", "decoder": {"kind": "transformer"}}, 32, ("transformer", 512, 8)),
        (
            {"encoder": "vit_base", "decoder": {"kind": "deconvolution"}},
            16,
            ("deconvolution", 512, 1),
        ),
        (
            {"encoder": "vit_nano", "decoder": {"kind": "deconvolution"}},
            16,
            ("deconvolution", 64, 1),
        ),
        ({"encoder": "vit_base"}, 16, ("transformer", 512, 8)),
        ({"decoder": {"kind": "cross_attention"}}, 16, ("cross_attention", 512, 8)),
        (
            {"encoder": "convnextv2_atto", "decoder": {"kind": "cross_attention"}},
            32,
            ("cross_attention", 192, 4),
        ),
    ],
)
def test_patch_size_and_decoder_have_defaults_that_fit_the_encoder(
    fields: dict[str, Any], patch_size: int, decoder: tuple[str, int, int]
) -> None:
    model = ModelConfig.model_validate(fields)
    assert model.patch_size == patch_size
    assert (model.decoder.kind, model.decoder.dim, model.decoder.depth) == decoder
    assert ModelConfig.model_validate(model.model_dump(mode="json")) == model


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (
            {"encoder": "resnet18", "patch_size": 14, "img_size": 224},
            "patch_size=14 is the stride of encoder=resnet18, which can be 32, 16, 8, 4",
        ),
        (
            {"encoder": "convnextv2_atto", "img_size": 240},
            "img_size=240x240 is not a multiple of patch_size=32, the stride of "
            "encoder=convnextv2_atto",
        ),
        (
            {"decoder": {"kind": "deconvolution", "prediction_ratio": 0.5}},
            "prediction_ratio=0.5: kind=deconvolution computes the whole picture",
        ),
        ({"encoder": "resnet34"}, "encoder"),
        (
            {"encoder": "resnet18", "class_tokens": 8},
            "class_tokens=8: encoder=resnet18 has no class token; leave it out",
        ),
    ],
)
def test_an_illegal_pair_is_refused_in_words(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        ModelConfig.model_validate(fields)
    assert told in str(refusal.value)


def test_a_grid_mask_has_one_ratio() -> None:
    assert MaskingConfig(kind="grid").mask_ratio == 0.75
    with pytest.raises(ValidationError, match=r"mask_ratio must be 0\.75, not 0\.5"):
        MaskingConfig(kind="grid", mask_ratio=0.5)
    assert MaskingConfig(kind="block", mask_ratio=0.5).mask_ratio == 0.5


def test_a_mask_ratio_changes_evenly_from_the_first_step_to_the_last() -> None:
    masking = MaskingConfig(mask_ratio=(0.5, 0.75))
    assert [masking.ratio_at(step, 6) for step in range(1, 7)] == pytest.approx(
        [0.5, 0.55, 0.6, 0.65, 0.7, 0.75]
    )
    assert (masking.last_ratio, masking.is_scheduled) == (0.75, True)
    assert masking.ratio_at(1, 1) == 0.5
    assert MaskingConfig.model_validate(masking.model_dump(mode="json")) == masking


def test_one_mask_ratio_is_that_of_every_step() -> None:
    masking = MaskingConfig(mask_ratio=0.6)
    assert {masking.ratio_at(step, 7) for step in range(1, 8)} == {0.6}
    assert (masking.ratios, masking.is_scheduled) == ((0.6, 0.6), False)


@pytest.mark.parametrize("ratio", [0, 1.0, [0.5, 1.5], [0.5], [0.4, 0.5, 0.6]])
def test_a_mask_ratio_that_is_no_share_is_shown(ratio: Any) -> None:
    with pytest.raises(ValidationError) as refusal:
        MaskingConfig.model_validate({"mask_ratio": ratio})
    shown = f"mask_ratio={float(ratio) if isinstance(ratio, int) else ratio}: give a share"
    assert shown in str(refusal.value)


@pytest.mark.parametrize(("batch", "rate"), [(256, 1.5e-4), (4096, 2.4e-3), (32, 1.875e-5)])
def test_the_learning_rate_grows_with_the_batch(batch: int, rate: float) -> None:
    assert OptimConfig(global_batch_size=batch).learning_rate == pytest.approx(rate, rel=1e-12)

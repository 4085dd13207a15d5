from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_core.config import ModelConfig
from mae_core.model.classifier import Classifier, build_classifier, layer_scales
from mae_core.model.conv_encoder import ConvEncoder
from mae_core.model.encoder import MaskedEncoder
from mae_core.model.family import build_encoder

Kind = Literal["finetune", "linear", "attentive"]
Pool = Literal["mean", "cls"]

ALL_KINDS = [
    ("finetune", "mean", None),
    ("finetune", "cls", None),
    ("finetune", "mean", 0),
    ("finetune", "cls", 0),
    ("finetune", "mean", 2),
    ("finetune", "cls", 2),
    ("finetune", "mean", 3),
    ("linear", "mean", None),
    ("linear", "cls", None),
    ("linear", "cls", 0),
    ("attentive", "mean", None),
    ("attentive", "cls", 0),
]


def make_encoder(depth: int = 3, drop_path_rate: float = 0.0) -> MaskedEncoder:
    torch.manual_seed(0)
    return MaskedEncoder(
        img_size=(16, 16),
        patch_size=4,
        in_chans=3,
        embed_dim=16,
        depth=depth,
        num_heads=2,
        drop_path_rate=drop_path_rate,
    )


class Convolutions(nn.Module):
    """An encoder that is not a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_size = 4
        self.embed_dim = 8
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.BatchNorm2d(8)

    def feature_map(self, images: Tensor) -> Tensor:
        return self.norm(self.stem(images))


def make_images(number: int = 4) -> Tensor:
    return torch.randn(number, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients_reach(model: Classifier) -> set[str]:
    nn.init.normal_(model.head.weight)  # 2e-5 is so small that gradients could be taken for 0
    F.cross_entropy(model(make_images()), torch.tensor([0, 1, 2, 0])).backward()
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().sum() > 0
    }


@pytest.mark.parametrize(("kind", "pool", "trainable_blocks"), ALL_KINDS)
def test_what_is_trained_gets_a_gradient_and_nothing_else_does(
    kind: Kind, pool: Pool, trainable_blocks: int | None
) -> None:
    model = build_classifier(
        make_encoder(), num_classes=3, kind=kind, pool=pool, trainable_blocks=trainable_blocks
    )
    assert gradients_reach(model) == trained_names(model)


@pytest.mark.parametrize(
    ("kind", "trainable_blocks"), [("finetune", None), ("finetune", 0), ("linear", None)]
)
def test_another_encoder_works_with_the_mean_of_its_map(
    kind: Kind, trainable_blocks: int | None
) -> None:
    encoder = Convolutions()
    model = build_classifier(
        encoder, num_classes=3, kind=kind, pool="mean", trainable_blocks=trainable_blocks
    )
    encoder.norm.weight.data.uniform_()
    reached = gradients_reach(model)
    # A constant added before a batch norm changes nothing, so its gradient is a rounding or 0.
    assert reached - {"encoder.stem.bias"} == trained_names(model) - {"encoder.stem.bias"}
    is_frozen = kind == "linear" or trainable_blocks == 0
    assert encoder.norm.training is not is_frozen
    model.eval()
    expected = model.head(model.fc_norm(encoder.feature_map(make_images()).mean(dim=(2, 3))))
    assert torch.equal(model(make_images()), expected)


def test_frozen_batch_norms_keep_their_statistics() -> None:
    encoder = Convolutions()
    model = build_classifier(encoder, num_classes=3, kind="linear", pool="mean")
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    model.train()(make_images())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert not torch.equal(model.fc_norm.running_mean, torch.zeros(8))  # the probe's own does move


@pytest.mark.parametrize(
    ("pool", "trainable_blocks", "trained"),
    [
        ("mean", 0, {"fc_norm", "head"}),
        ("cls", 0, {"encoder.norm", "head"}),
        ("mean", 1, {"encoder.blocks.2", "fc_norm", "head"}),
        ("cls", 2, {"encoder.blocks.1", "encoder.blocks.2", "encoder.norm", "head"}),
    ],
)
def test_only_the_last_blocks_and_what_follows_are_trained(
    pool: Pool, trainable_blocks: int, trained: set[str]
) -> None:
    model = build_classifier(
        make_encoder(),
        num_classes=3,
        kind="finetune",
        pool=pool,
        trainable_blocks=trainable_blocks,
    )
    expected = {name for name, _ in model.named_parameters() if name.startswith(tuple(trained))}
    assert trained_names(model) == expected


def test_an_encoder_that_was_frozen_before_is_trained_again() -> None:
    encoder = make_encoder()
    build_classifier(encoder, num_classes=3, kind="linear", pool="mean")
    model = build_classifier(encoder, num_classes=3, kind="finetune", pool="mean")
    assert "encoder.cls_token" in trained_names(model)
    assert encoder.blocks[0].training


def test_fine_tuning_takes_the_mean_of_patches_before_the_last_norm() -> None:
    encoder = make_encoder()
    model = build_classifier(encoder, num_classes=3, kind="finetune", pool="mean")
    nn.init.normal_(model.fc_norm.weight)
    images = make_images()
    pooled = encoder.tokens(images)[:, 1:].mean(dim=1)
    normed = F.layer_norm(pooled, (16,), model.fc_norm.weight, model.fc_norm.bias, 1e-6)
    assert torch.allclose(model(images), model.head(normed), atol=1e-6)
    nn.init.normal_(encoder.norm.weight)
    assert torch.allclose(model(images), model.head(normed), atol=1e-6)


def test_fine_tuning_by_the_class_token_takes_it_after_the_last_norm() -> None:
    encoder = make_encoder()
    model = build_classifier(encoder, num_classes=3, kind="finetune", pool="cls")
    nn.init.normal_(encoder.norm.weight)
    images = make_images()
    assert torch.equal(model(images), model.head(encoder(images)[:, 0]))


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_a_linear_probe_standardises_features_after_the_last_norm(pool: Pool) -> None:
    encoder = make_encoder()
    model = build_classifier(encoder, num_classes=3, kind="linear", pool=pool)
    nn.init.normal_(encoder.norm.weight)
    images = make_images()
    tokens = encoder(images)
    features = tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1)
    variance = features.var(dim=0, unbiased=False)
    expected = (features - features.mean(dim=0)) / (variance + 1e-6).sqrt()
    assert torch.allclose(model(images), model.head(expected), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "trainable_blocks", "modes"),
    [
        ("finetune", None, [True, True, True]),
        ("finetune", 2, [False, True, True]),
        ("finetune", 0, [False, False, False]),
        ("linear", None, [False, False, False]),
    ],
)
def test_frozen_blocks_stay_in_eval_mode(
    kind: Kind, trainable_blocks: int | None, modes: list[bool]
) -> None:
    encoder = make_encoder(drop_path_rate=0.5)
    model = build_classifier(
        encoder, num_classes=3, kind=kind, pool="mean", trainable_blocks=trainable_blocks
    )
    for _ in range(2):
        assert [block.training for block in encoder.blocks] == modes
        assert encoder.blocks[2].drop_path1.training == modes[2]
        assert model.fc_norm.training
        model.eval()
        assert not any(module.training for module in model.modules())
        assert model.train() is model


def test_no_graph_is_built_through_a_frozen_encoder() -> None:
    encoder = make_encoder()
    model = build_classifier(encoder, num_classes=3, kind="linear", pool="mean")
    assert model(make_images()).requires_grad
    assert not encoder(make_images()).requires_grad


@pytest.mark.parametrize(("kind", "std"), [("finetune", 2e-5), ("linear", 0.01)])
def test_the_head_starts_as_the_references(kind: Kind, std: float) -> None:
    model = build_classifier(make_encoder(), num_classes=1000, kind=kind, pool="mean")
    assert model.head.weight.std().item() == pytest.approx(std, rel=0.05)
    assert model.head.bias.abs().max() == 0


@pytest.mark.parametrize("trainable_blocks", [-1, 4])
def test_a_number_of_blocks_that_the_encoder_has_not_is_an_error(trainable_blocks: int) -> None:
    with pytest.raises(ValueError, match=rf"trainable_blocks={trainable_blocks} is not in 0\.\.3"):
        build_classifier(
            make_encoder(),
            num_classes=3,
            kind="finetune",
            pool="mean",
            trainable_blocks=trainable_blocks,
        )


def test_what_an_encoder_can_not_do_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"is not in 0\.\.0"):
        build_classifier(
            Convolutions(), num_classes=3, kind="finetune", pool="mean", trainable_blocks=1
        )
    with pytest.raises(ValueError, match="pool=cls needs a class token"):
        build_classifier(Convolutions(), num_classes=3, kind="finetune", pool="cls")
    with pytest.raises(ValueError, match="kind=linear trains no block"):
        build_classifier(
            make_encoder(), num_classes=3, kind="linear", pool="mean", trainable_blocks=1
        )


def test_layer_decay_gives_the_references_factors_for_12_blocks() -> None:
    model = build_classifier(make_encoder(depth=12), num_classes=3, kind="finetune", pool="mean")
    scales = layer_scales(model, 0.65)
    assert set(scales) == {name for name, _ in model.named_parameters()}
    # Worked out from MAE's util/lr_decay.py for ViT-B.
    for name, factor in {
        "encoder.cls_token": 0.003697205891018715,
        "encoder.patch_embed.proj.weight": 0.003697205891018715,
        "encoder.patch_embed.proj.bias": 0.003697205891018715,
        "encoder.blocks.0.attn.qkv.weight": 0.005688009063105715,
        "encoder.blocks.1.norm1.bias": 0.008750783174008792,
        "encoder.blocks.10.mlp.fc2.weight": 0.4225,
        "encoder.blocks.11.mlp.fc1.weight": 0.65,
        "encoder.norm.weight": 1.0,
        "fc_norm.weight": 1.0,
        "head.weight": 1.0,
        "head.bias": 1.0,
    }.items():
        assert scales[name] == pytest.approx(factor, rel=1e-12), name


def test_layer_decay_needs_layers() -> None:
    model = build_classifier(Convolutions(), num_classes=3, kind="finetune", pool="mean")
    assert set(layer_scales(model, 1.0).values()) == {1.0}
    with pytest.raises(ValueError, match=r"layer_decay=0\.75 needs"):
        layer_scales(model, 0.75)


def test_it_takes_images_of_another_size() -> None:
    model = build_classifier(make_encoder(), num_classes=3, kind="finetune", pool="mean")
    assert model(torch.zeros(2, 3, 24, 32)).shape == (2, 3)


@pytest.mark.parametrize("kind", ["finetune", "linear"])
def test_a_tiny_classifier_learns_8_images(kind: Kind) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(ModelConfig(encoder="vit_micro", img_size=16, patch_size=4))
    model = build_classifier(encoder, num_classes=4, kind=kind, pool="mean")
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    images, labels = make_images(8), torch.arange(8) % 4
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3 if kind == "finetune" else 1e-1)
    for _ in range(20):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert torch.equal(model(images).argmax(dim=1), labels)
    moved = {name for name, value in encoder.state_dict().items() if not value.equal(before[name])}
    assert moved == (set() if kind == "linear" else set(before) - {"norm.weight", "norm.bias"})


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_a_fitted_classifier_is_taken_over_as_it_is(pool: Pool) -> None:
    model = build_classifier(make_encoder(), num_classes=3, kind="finetune", pool=pool).eval()
    images, generator = make_images(8), torch.Generator().manual_seed(2)
    features = model.features(images).detach()
    std, mean = torch.std_mean(features, dim=0)
    weight = torch.randn(3, 16, generator=generator)
    bias = torch.randn(3, generator=generator)
    model.start_from(mean=mean, std=std, weight=weight, bias=bias)
    standardised = model.features(images).detach()
    assert torch.allclose(standardised, (features - mean) / std, atol=1e-4)
    assert torch.allclose(model(images), standardised @ weight.T + bias, atol=1e-4)


def test_an_encoder_that_is_no_transformer_takes_over_a_classifier_too() -> None:
    model = build_classifier(Convolutions(), num_classes=3, kind="finetune", pool="mean").eval()
    features = model.features(make_images()).detach()
    std, mean = torch.std_mean(features, dim=0)
    model.start_from(mean=mean, std=std, weight=torch.zeros(3, 8), bias=torch.arange(3.0))
    assert torch.allclose(model.features(make_images()), (features - mean) / std, atol=1e-4)
    assert model(make_images())[0].tolist() == pytest.approx([0, 1, 2])


def test_a_batch_norm_without_parameters_takes_over_nothing() -> None:
    model = build_classifier(make_encoder(), num_classes=3, kind="linear", pool="mean")
    ones, bias = torch.ones(16), torch.zeros(3)
    with pytest.raises(ValueError, match="a BatchNorm1d before the head can't take over a scale"):
        model.start_from(mean=ones, std=ones, weight=torch.zeros(3, 16), bias=bias)


def make_probe(encoder: nn.Module) -> Classifier:
    return build_classifier(encoder, num_classes=3, kind="attentive", pool="mean").eval()


def test_an_attentive_probe_starts_from_the_mean_of_the_patches() -> None:
    model = make_probe(make_encoder())
    images = make_images()
    mean = model.encoder(images)[:, 1:].mean(dim=1)
    assert torch.allclose(model.features(images), F.layer_norm(mean, (16,)), atol=1e-4)
    assert torch.allclose(model.attention(images), torch.full((4, 4, 4), 1 / 16))


@pytest.mark.parametrize("encoder", [make_encoder(), Convolutions()])
def test_an_attentive_probe_weighs_the_patches_by_its_query(encoder: nn.Module) -> None:
    model, images = make_probe(encoder), make_images()
    patches = model.encoder.feature_map(images).detach()
    assert model.query is not None
    with torch.no_grad():  # the direction of one patch of the first image, apart from the mean
        model.query.copy_(20 * (patches[0, :, 1, 2] - patches[0].mean(dim=(1, 2))))
    weights = model.attention(images)
    assert torch.allclose(weights.sum(dim=(1, 2)), torch.ones(4))
    assert weights[0, 1, 2] == weights[0].max() > 0.9
    pooled = F.layer_norm(patches[0, :, 1, 2], (patches.shape[1],))
    assert torch.allclose(model.features(images)[0], pooled, atol=0.3)


def test_an_attentive_probe_trains_its_query_and_keeps_the_encoder() -> None:
    model = build_classifier(make_encoder(), num_classes=3, kind="attentive", pool="mean")
    names = {"query", "fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert trained_names(model) == names
    assert gradients_reach(model) == names


@pytest.mark.parametrize(
    ("name", "factors"),
    [
        (
            "resnet18",
            {
                "encoder.net.conv1.weight": 0.5**9,
                "encoder.net.bn1.bias": 0.5**9,
                "encoder.net.layer1.0.conv1.weight": 0.5**8,
                "encoder.net.layer4.1.bn2.weight": 0.5,
                "head.weight": 1.0,
            },
        ),
        (
            "convnextv2_atto",
            {
                "encoder.net.stem.0.weight": 0.5**13,
                "encoder.net.stages.0.blocks.0.conv_dw.weight": 0.5**12,
                "encoder.net.stages.3.blocks.1.mlp.grn.weight": 0.5,
                "fc_norm.bias": 1.0,
            },
        ),
    ],
)
def test_layer_decay_counts_the_blocks_of_a_convolutional_encoder(
    name: str, factors: dict[str, float]
) -> None:
    encoder = ConvEncoder(name, patch_size=4, in_chans=3)
    model = build_classifier(encoder, num_classes=3, kind="finetune", pool="mean")
    scales = layer_scales(model, 0.5)
    assert set(scales) == {name for name, _ in model.named_parameters()}
    assert {name: scales[name] for name in factors} == factors


def test_the_last_blocks_of_a_convolutional_encoder_train_alone() -> None:
    encoder = ConvEncoder("resnet18", patch_size=4, in_chans=3)
    model = build_classifier(
        encoder, num_classes=3, kind="finetune", pool="mean", trainable_blocks=2
    )
    trained = {
        n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad and "net" in n
    }
    assert trained == {"layer4"}
    before = encoder.net.bn1.running_mean.clone()  # type: ignore[union-attr, operator]
    model.train()(make_images()).sum().backward()
    assert torch.equal(before, encoder.net.bn1.running_mean)  # type: ignore[union-attr, arg-type]
    with pytest.raises(ValueError, match=r"trainable_blocks=9 is not in 0\.\.8"):
        build_classifier(encoder, num_classes=3, kind="finetune", pool="mean", trainable_blocks=9)


@pytest.mark.parametrize("kind", ["linear", "attentive", "finetune"])
def test_a_convolutional_encoder_is_pooled_over_its_places(kind: Kind) -> None:
    encoder = ConvEncoder("convnextv2_atto", patch_size=4, in_chans=3)
    model = build_classifier(encoder, num_classes=3, kind=kind, pool="mean").eval()
    expected = model.fc_norm(encoder(make_images()).mean(dim=1))
    torch.testing.assert_close(model.features(make_images()), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="pool=cls needs a class token"):
        build_classifier(encoder, num_classes=3, kind=kind, pool="cls")


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_several_class_tokens_are_pooled_apart_from_the_patches(pool: Pool) -> None:
    torch.manual_seed(0)
    config = ModelConfig(encoder="vit_nano", img_size=(16, 16), patch_size=4, class_tokens=3)
    encoder = build_encoder(config)
    model = build_classifier(encoder, num_classes=3, kind="linear", pool=pool).eval()
    tokens = encoder(make_images())
    expected = (tokens[:, 3:] if pool == "mean" else tokens[:, :3]).mean(dim=1)
    torch.testing.assert_close(model.features(make_images()), model.fc_norm(expected))

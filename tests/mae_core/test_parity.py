"""Number for number against the reference: P1, P3, P4 and P5; the others sit beside their code.

transformers' ViT-MAE and timm's ViT stand in for the authors' code. Nothing is downloaded.
"""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from mae_core.config import DecoderConfig, LossConfig, MaskingConfig, ModelConfig
from mae_core.interchange.fair import fair_encoder_state_dict, fair_state_dict
from mae_core.model.encoder import MaskedEncoder
from mae_core.model.family import build_encoder
from mae_core.model.mae import MAEOutput, MaskedAutoencoder, build_mae
from mae_core.model.positions import sincos_positions

BLOCK_NAMES = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
OTHER_NAMES = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "mask_token": "decoder.mask_token",
    "decoder_embed": "decoder.decoder_embed",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
}


def to_transformers(fair: dict[str, Tensor]) -> dict[str, Tensor]:
    """Map the authors' names to transformers', which splits attention's matrix into three."""
    renamed = {}
    for name, tensor in fair.items():
        stem, _, kind = name.rpartition(".")
        if not stem or name in OTHER_NAMES:
            renamed[OTHER_NAMES[name]] = tensor
        elif "blocks." not in stem:
            renamed[f"{OTHER_NAMES[stem]}.{kind}"] = tensor
        else:
            blocks, index, part = stem.split(".", maxsplit=2)
            half = {"blocks": "vit.layers", "decoder_blocks": "decoder.decoder_layers"}[blocks]
            if part == "attn.qkv":
                for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
                    renamed[f"{half}.{index}.attention.{letter}_proj.{kind}"] = rows
            else:
                renamed[f"{half}.{index}.{BLOCK_NAMES[part]}.{kind}"] = tensor
    return renamed


def make_pair(
    model: ModelConfig, *, norm_pix: bool, attention: str = "sdpa"
) -> tuple[MaskedAutoencoder, ViTMAEForPreTraining]:
    """Build ours and transformers' with the same random weights, including biases and norms."""
    torch.manual_seed(0)
    ours = build_mae(model, MaskingConfig(), LossConfig(norm_pix=norm_pix, norm_pix_floor=1e-6))
    for parameter in ours.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=model.encoder_shape.embed_dim,
            num_hidden_layers=model.encoder_shape.depth,
            num_attention_heads=model.encoder_shape.num_heads,
            intermediate_size=4 * model.encoder_shape.embed_dim,
            image_size=model.img_size[0],
            patch_size=model.patch_size,
            num_channels=model.in_chans,
            decoder_hidden_size=model.decoder.dim,
            decoder_num_hidden_layers=model.decoder.depth,
            decoder_num_attention_heads=model.decoder.num_heads,
            decoder_intermediate_size=4 * model.decoder.dim,
            layer_norm_eps=1e-6,
            norm_pix_loss=norm_pix,
            attn_implementation=attention,
        )
    )
    theirs.load_state_dict(to_transformers(fair_state_dict(ours)))
    return ours, theirs


MICRO = ModelConfig(
    encoder="vit_micro",
    img_size=(64, 64),
    patch_size=8,
    decoder=DecoderConfig(dim=64, depth=2, num_heads=4),
)


@pytest.mark.parametrize("dim", [64, 768])
@pytest.mark.parametrize("grid", [4, 14, 16])
def test_p1_positions_are_those_of_transformers(grid: int, dim: int) -> None:
    theirs = build_2d_sinusoidal_position_embedding(grid, grid, dim)
    # Rows first there; its ViT-MAE swaps the halves to match the published weights.
    theirs = torch.cat([theirs[:, dim // 2 :], theirs[:, : dim // 2]], dim=1)
    assert (theirs - sincos_positions((grid, grid), dim)).abs().max() <= 1e-7


@pytest.mark.parametrize(
    ("encoder", "patch_size", "num_encoder", "num_total"),
    [
        ("vit_base", 16, 85_798_656, 111_907_840),
        ("vit_large", 16, 303_301_632, 329_541_888),
        ("vit_huge", 14, 630_764_800, 657_074_508),
    ],
)
def test_p3_names_and_sizes_are_the_published_ones(
    encoder: str, patch_size: int, num_encoder: int, num_total: int
) -> None:
    config = ModelConfig(encoder=encoder, patch_size=patch_size)
    with torch.device("meta"):
        mae = build_mae(config, MaskingConfig(), LossConfig())
    fair = fair_state_dict(mae)
    assert sum(tensor.numel() for tensor in fair.values()) == num_total
    assert sum(t.numel() for t in fair_encoder_state_dict(mae.encoder).values()) == num_encoder

    width, depth, num_patches = *config.encoder_shape[:2], config.num_patches
    expected = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + num_patches, width),
        "patch_embed.proj.weight": (width, 3, patch_size, patch_size),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "mask_token": (1, 1, 512),
        "decoder_embed.weight": (512, width),
        "decoder_embed.bias": (512,),
        "decoder_pos_embed": (1, 1 + num_patches, 512),
        "decoder_norm.weight": (512,),
        "decoder_norm.bias": (512,),
        "decoder_pred.weight": (3 * patch_size**2, 512),
        "decoder_pred.bias": (3 * patch_size**2,),
    }
    for blocks, dim, number in (("blocks", width, depth), ("decoder_blocks", 512, 8)):
        for index in range(number):
            for part, shape in {
                "norm1": (dim,),
                "norm2": (dim,),
                "attn.qkv": (3 * dim, dim),
                "attn.proj": (dim, dim),
                "mlp.fc1": (4 * dim, dim),
                "mlp.fc2": (dim, 4 * dim),
            }.items():
                expected[f"{blocks}.{index}.{part}.weight"] = shape
                expected[f"{blocks}.{index}.{part}.bias"] = shape[:1]
    assert {name: tuple(tensor.shape) for name, tensor in fair.items()} == expected


def of_removed(values: Tensor, output: MAEOutput) -> Tensor:
    """Return those of (B, L, P) values that are of removed patches, in the model's order."""
    return values[torch.arange(len(values))[:, None], output.ids_removed]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_p4_loss_prediction_mask_and_gradients_are_those_of_transformers(
    norm_pix: bool, attention: str
) -> None:
    ours, theirs = make_pair(MICRO, norm_pix=norm_pix, attention=attention)
    images, noise = torch.randn(3, 3, 64, 64) * 1.5 + 0.3, torch.rand(3, 64)
    output = ours(images, noise)
    expected = theirs(images, noise=noise)
    assert abs(output.loss.item() - expected.loss.item()) <= 1e-5
    assert (output.pred - of_removed(expected.logits, output)).abs().max() <= 1e-4
    assert torch.equal(output.mask, expected.mask.bool())
    ids = expected.ids_restore.argsort(dim=1)
    assert torch.equal(output.ids_removed, ids[:, -output.ids_removed.shape[1] :])

    output.loss.backward()
    expected.loss.backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    encoder = {n: p.grad for n, p in ours.encoder.named_parameters()}
    decoder = {n: p.grad for n, p in ours.decoder.named_parameters()}
    fair = encoder | {n if n == "mask_token" else f"decoder_{n}": g for n, g in decoder.items()}
    renamed = to_transformers(fair)
    assert renamed.keys() == gradients.keys()
    for name, gradient in gradients.items():
        # A key's bias shifts all scores of a query alike: its gradient is zero but for rounding.
        if not name.endswith("k_proj.bias"):
            difference = (renamed[name] - gradient).norm() / gradient.norm()
            assert difference <= 1e-5, name


@pytest.mark.slow
def test_p4_holds_for_vit_base() -> None:
    ours, theirs = make_pair(ModelConfig(), norm_pix=True)
    images, noise = torch.randn(2, 3, 224, 224), torch.rand(2, 196)
    with torch.no_grad():
        output = ours(images, noise)
        expected = theirs(images, noise=noise)
    assert abs(output.loss.item() - expected.loss.item()) <= 1e-5
    assert (output.pred - of_removed(expected.logits, output)).abs().max() <= 1e-4


def make_timm(encoder: MaskedEncoder, img_size: tuple[int, int]) -> VisionTransformer:
    vit = VisionTransformer(
        img_size=img_size,
        patch_size=encoder.patch_size,
        in_chans=encoder.patch_embed.proj.in_channels,
        embed_dim=encoder.embed_dim,
        depth=len(encoder.blocks),
        num_heads=encoder.blocks[0].attn.num_heads,
        num_classes=0,
        global_pool="token",
        dynamic_img_size=True,
    )
    vit.load_state_dict(fair_encoder_state_dict(encoder))
    return vit.eval()


@pytest.mark.parametrize("in_chans", [3, 13])
@pytest.mark.parametrize(
    ("img_size", "size"),
    [((32, 32), (32, 32)), ((16, 48), (16, 48)), ((32, 32), (64, 64)), ((32, 32), (24, 80))],
)
def test_p5_features_are_those_of_timm(
    img_size: tuple[int, int], size: tuple[int, int], in_chans: int
) -> None:
    torch.manual_seed(0)
    encoder = MaskedEncoder(
        img_size=img_size, patch_size=8, in_chans=in_chans, embed_dim=48, depth=3, num_heads=4
    ).eval()
    vit = make_timm(encoder, img_size)
    images = torch.randn(2, in_chans, *size)
    with torch.no_grad():
        assert (encoder(images) - vit.forward_features(images)).abs().max() <= 1e-5
        assert (encoder(images)[:, 0] - vit(images)).abs().max() <= 1e-5


def test_p5_holds_for_vit_base() -> None:
    torch.manual_seed(0)
    encoder = build_encoder(ModelConfig()).eval()
    vit = timm.create_model(
        "vit_base_patch16_224", pretrained=False, num_classes=0, global_pool="token"
    ).eval()
    vit.load_state_dict(fair_encoder_state_dict(encoder))
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert (encoder(images) - vit.forward_features(images)).abs().max() <= 1e-5

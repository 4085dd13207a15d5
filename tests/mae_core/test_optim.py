import math

import numpy as np
import pytest
import torch
from torch import nn

from mae_core.config import OptimConfig
from mae_core.model.decoder import PixelDecoder
from mae_core.model.encoder import MaskedEncoder
from mae_core.optim import (
    build_lars,
    build_optimizer,
    fine_tuning_groups,
    parameter_groups,
    warmup_cosine,
    with_head_scale,
)


# Parity P7: ViT-B in 800 epochs of 312 steps, with the reference's fraction of an epoch.
@pytest.mark.parametrize(
    ("step", "learning_rate"),
    [
        (0, 0.0),
        (156, 3e-05),
        (312, 6e-05),
        (3120, 0.0006),
        (6240, 0.0012),
        (12168, 0.00234),
        (12480, 0.0024),  # epoch 40: the peak
        (12792, 0.002399989748),
        (18720, 0.002395901392),
        (31200, 0.002363280319),
        (46800, 0.002278069178),
        (62400, 0.002146968611),
        (93600, 0.001771136872),
        (124800, 0.001299095215),
        (131040, 0.0012),  # half way between 40 and 800
        (156000, 0.000810360637),
        (187200, 0.000387262114),
        (218400, 0.000101072008),
        (243360, 4.098608392e-06),
        (249288, 1.025234454e-08),
        (249600, 0.0),
        (300000, 0.0),
    ],
)
def test_learning_rate_follows_the_reference(step: int, learning_rate: float) -> None:
    ours = warmup_cosine(step, peak=2.4e-3, warmup_steps=12_480, total_steps=249_600)
    assert ours == pytest.approx(learning_rate, rel=1e-8, abs=0)


def test_without_warmup_the_first_step_has_the_peak() -> None:
    assert warmup_cosine(0, peak=1.0, warmup_steps=0, total_steps=2) == 1.0
    assert warmup_cosine(1, peak=1.0, warmup_steps=0, total_steps=2) == pytest.approx(0.5)


def test_warmup_may_end_between_two_steps() -> None:
    assert warmup_cosine(1, peak=1.0, warmup_steps=1.25, total_steps=4) == pytest.approx(0.8)
    # (2 - 1.25) / (4.25 - 1.25) = 1/4 of the half cosine.
    ours = warmup_cosine(2, peak=1.0, warmup_steps=1.25, total_steps=4.25)
    assert ours == pytest.approx(0.85355339)


def test_a_run_shorter_than_its_warmup_only_rises() -> None:
    assert warmup_cosine(9, peak=1.0, warmup_steps=100, total_steps=10) == pytest.approx(0.09)


def make_model() -> nn.ModuleDict:
    encoder = MaskedEncoder(
        img_size=(16, 16), patch_size=8, in_chans=3, embed_dim=8, depth=1, num_heads=2
    )
    decoder = PixelDecoder(
        encoder_dim=8, grid_size=(2, 2), dim=4, depth=1, num_heads=1, values_per_patch=192
    )
    return nn.ModuleDict({"encoder": encoder, "decoder": decoder})


def test_matrices_and_tokens_are_decayed_and_nothing_else() -> None:
    model = make_model()
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, exempt = parameter_groups(model, 0.05)
    assert decayed["weight_decay"] == 0.05
    assert exempt["weight_decay"] == 0.0
    block = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert {name_of[id(p)] for p in decayed["params"]} == {
        "encoder.cls_token",
        "encoder.patch_embed.proj.weight",
        *(f"encoder.blocks.0.{name}.weight" for name in block),
        "decoder.mask_token",
        "decoder.embed.weight",
        *(f"decoder.blocks.0.{name}.weight" for name in block),
        "decoder.pred.weight",
    }
    norms = ["encoder.blocks.0.norm1", "encoder.blocks.0.norm2", "encoder.norm"]
    norms += ["decoder.blocks.0.norm1", "decoder.blocks.0.norm2", "decoder.norm"]
    assert {name_of[id(p)] for p in exempt["params"]} == {
        *(f"{name}.{kind}" for name in norms for kind in ("weight", "bias")),
        *(f"{half}.blocks.0.{name}.bias" for half in ("encoder", "decoder") for name in block),
        "encoder.patch_embed.proj.bias",
        "decoder.embed.bias",
        "decoder.pred.bias",
    }


def test_frozen_parameters_are_in_no_group() -> None:
    model = make_model()
    model["encoder"].requires_grad_(False)
    params = [p for group in parameter_groups(model, 0.05) for p in group["params"]]
    assert {id(p) for p in params} == {id(p) for p in model["decoder"].parameters()}


def test_a_bias_of_two_dimensions_is_not_decayed() -> None:
    model = nn.ParameterDict({"weight": torch.ones(2, 2), "norm": torch.ones(2)})
    model.register_module("table", nn.ParameterDict({"bias": torch.ones(2, 2)}))
    decayed, exempt = parameter_groups(model, 0.05)
    assert (len(decayed["params"]), len(exempt["params"])) == (1, 2)


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_follows_an_independent_one_for_ten_steps(fused: bool) -> None:
    """Parity P7. Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101, algorithm 2."""
    rng = np.random.default_rng(0)
    layer = nn.Linear(3, 2).double()
    optimizer = build_optimizer(layer, OptimConfig(), fused=fused)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2.4e-3)  # 1.5e-4 * 4096 / 256

    for parameter, decay in ((layer.weight, 0.05), (layer.bias, 0.0)):
        ours = parameter
        theirs = parameter.detach().numpy().copy()
        gradients = rng.normal(size=(10, *theirs.shape))
        first, second = np.zeros_like(theirs), np.zeros_like(theirs)
        for step in range(1, 11):
            learning_rate = 1e-3 * step / 10
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.zero_grad(set_to_none=True)  # the other parameter stands still
            ours.grad = torch.from_numpy(gradients[step - 1])
            optimizer.step()

            first = 0.9 * first + 0.1 * gradients[step - 1]
            second = 0.95 * second + 0.05 * gradients[step - 1] ** 2
            theirs *= 1 - learning_rate * decay
            scale = np.sqrt(second / (1 - 0.95**step)) + 1e-8
            theirs -= learning_rate * first / (1 - 0.9**step) / scale
            assert np.allclose(ours.detach().numpy(), theirs, rtol=0, atol=1e-12)


def test_learning_rate_is_never_above_the_peak() -> None:
    rates = [warmup_cosine(s, peak=1.0, warmup_steps=7, total_steps=31) for s in range(40)]
    assert max(rates) == 1.0
    assert rates.index(1.0) == 7
    assert all(math.isfinite(rate) and rate >= 0 for rate in rates)


def test_a_half_cosine_may_end_above_zero() -> None:
    """MAE's fine-tuning: the warm-up still starts at 0, and the floor is met at the end."""

    def rate(step: int) -> float:
        return warmup_cosine(step, peak=1.0, warmup_steps=2, total_steps=10, floor=0.2)

    rates = [rate(step) for step in (0, 1, 2, 6, 10, 11)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.6, 0.2, 0.2])


def test_fine_tuning_groups_have_one_factor_and_one_decay_each() -> None:
    encoder = make_model()["encoder"]
    encoder.norm.requires_grad_(False)
    name_of = {id(parameter): name for name, parameter in encoder.named_parameters()}
    scales = {name: 0.5 if name.startswith("blocks.") else 0.25 for name in name_of.values()}
    groups = fine_tuning_groups(encoder, 0.05, scales)
    found = {
        (group["lr_scale"], group["weight_decay"]): {name_of[id(p)] for p in group["params"]}
        for group in groups
    }
    layers = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert len(groups) == len(found) == 4
    assert found[0.25, 0.05] == {"patch_embed.proj.weight"}
    assert found[0.25, 0.0] == {"cls_token", "patch_embed.proj.bias"}  # as the reference's
    assert found[0.5, 0.05] == {f"blocks.0.{name}.weight" for name in layers}
    assert found[0.5, 0.0] == {
        *(f"blocks.0.{name}.bias" for name in layers),
        *(f"blocks.0.{name}.{kind}" for name in ("norm1", "norm2") for kind in ("weight", "bias")),
    }
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    assert [group["lr_scale"] for group in optimizer.param_groups] == [
        group["lr_scale"] for group in groups
    ]


def test_a_parameter_without_a_factor_is_an_error() -> None:
    with pytest.raises(KeyError, match="weight"):
        fine_tuning_groups(nn.Linear(2, 2), 0.05, {"module.weight": 1.0})


def test_lars_follows_an_independent_one_for_ten_steps() -> None:
    """You et al. 2017, https://arxiv.org/abs/1708.03888, algorithm 1, without weight decay."""
    rng = np.random.default_rng(0)
    layer = nn.Linear(3, 2).double()
    optimizer = build_lars(layer, learning_rate=6.4)
    assert {group["lr"] for group in optimizer.param_groups} == {6.4}
    theirs = {name: p.detach().numpy().copy() for name, p in layer.named_parameters()}
    momentum = {name: np.zeros_like(value) for name, value in theirs.items()}
    for step in range(1, 11):
        learning_rate = 6.4 * step / 10
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        for name, parameter in layer.named_parameters():
            gradient = rng.normal(size=parameter.shape)
            parameter.grad = torch.from_numpy(gradient.copy())
            # A bias takes the plain gradient, as in the authors' util/lars.py.
            if name == "weight":
                norms = np.linalg.norm(theirs[name]), np.linalg.norm(gradient)
                gradient = gradient * (0.001 * norms[0] / norms[1])
            momentum[name] = 0.9 * momentum[name] + gradient
            theirs[name] -= learning_rate * momentum[name]
        optimizer.step()
        for name, parameter in layer.named_parameters():
            # timm adds 1e-8 to the gradient's norm.
            assert np.allclose(parameter.detach().numpy(), theirs[name], rtol=1e-6, atol=1e-8)


def test_lars_leaves_frozen_parameters_alone() -> None:
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    params = [
        p for group in build_lars(layer, learning_rate=1.0).param_groups for p in group["params"]
    ]
    assert [id(p) for p in params] == [id(layer.weight)]


def test_lars_moves_a_weight_of_zeros() -> None:
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    optimizer = build_lars(layer, learning_rate=0.5)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight, torch.full((2, 3), -0.5))


def test_the_head_has_a_rate_of_its_own() -> None:
    scales = {"encoder.blocks.0.weight": 0.5, "pyramid.weight": 1.0, "heads.encoder.bias": 0.75}
    assert with_head_scale(scales, 4.0) == {
        "encoder.blocks.0.weight": 0.5,
        "pyramid.weight": 4.0,
        "heads.encoder.bias": 3.0,
    }

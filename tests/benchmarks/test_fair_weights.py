"""`make check-fair-weights` on random weights in the shape of the authors' ViT-B file."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from mae_core.config import ModelConfig
from mae_core.interchange.fair import fair_encoder_state_dict
from mae_core.model.family import build_encoder
from mae_core.model.positions import sincos_positions

SCRIPT = Path(__file__).parents[2] / "benchmarks/fair_weights.py"


def test_a_file_of_the_authors_shape_passes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mae_pretrain_vit_base.pth"
    with torch.device("meta"):
        shapes = fair_encoder_state_dict(build_encoder(ModelConfig()))
    weights = {name: torch.empty(x.shape).uniform_(-0.05, 0.05) for name, x in shapes.items()}
    table = torch.cat([torch.zeros(1, 768), sincos_positions((14, 14), 768)])
    torch.save({"model": {**weights, "pos_embed": table[None]}}, file)
    runpy.run_path(str(SCRIPT))["main"](str(file))
    told = capsys.readouterr().out
    for name, value in {
        "format": "MAE authors' file",
        "encoder": "vit_base: 768 wide, 12 deep, 12 heads",
        "patch size": "16",
        "positions": "fixed, for 14x14 patches",
        "parameters": re.escape("85,647,360 (encoder 85,647,360)"),
    }.items():
        assert re.search(rf"{name}  {value}", told), name
    assert told.endswith("passed\n")

"""`mae masks preview` draws each kind of mask on a picture, or says what is wrong."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.cli import main
from pipelines.commands.masks import command


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (100, 80), "white").save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_a_picture_is_written_and_named(
    image: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    out = image.parent / "masks.png"
    words = ["preview", str(image), str(out), "--img-size=64", "--patch-size=8", "--draws=2"]
    assert command(words) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert caplog.messages == ["drawing the masks ..."]
    with Image.open(out) as sheet:
        assert (np.asarray(sheet) == 128).all(axis=-1).any()


def test_sixteen_bits_are_shown_by_their_upper_eight(tmp_path: Path) -> None:
    Image.fromarray(np.full((64, 64), 0xC000, np.uint16)).save(tmp_path / "deep.png")
    out = tmp_path / "masks.png"
    words = ["preview", str(tmp_path / "deep.png"), str(out), "--img-size=64", "--patch-size=8"]
    assert command(words) == 0
    with Image.open(out) as sheet:
        assert (np.asarray(sheet) == 0xC0).all(axis=-1).any()


@pytest.mark.parametrize(
    ("words", "exit_code", "message"),
    [
        (["--patch-size=10"], 2, "config error: --img-size=224 is not a multiple of --patch-size"),
        (["--mask-ratio=1"], 2, "--mask-ratio=1.0: give a share between 0 and 1"),
        (["--cell=0"], 2, "argument --cell: invalid whole number from 1 to 1024 value: '0'"),
        (["--draws=4000"], 2, "argument --draws: invalid whole number from 1 to 16"),
        (["--seed=-1"], 2, "argument --seed: invalid whole number from 0 to"),
        (["/no/such/folder/masks.png"], 2, "/no/such/folder/masks.png: can't be written: No such"),
        (["--img-size=100000"], 2, "argument --img-size: invalid whole number from 1 to 1024"),
    ],
)
def test_a_wrong_number_is_named(
    image: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    exit_code: int,
    message: str,
) -> None:
    assert main(["masks", "preview", str(image), *words]) == exit_code
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_picture_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "no.jpg").write_text("no")
    assert main(["masks", "preview", str(tmp_path / "no.jpg")]) == 4
    assert f"data error: {tmp_path}/no.jpg: " in capsys.readouterr().err
    assert main(["masks", "preview", str(tmp_path / "missing.jpg")]) == 4


def test_the_picture_itself_is_not_written_over(
    image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = image.read_bytes()
    assert main(["masks", "preview", str(image), str(image)]) == 2
    assert "this is the picture itself" in capsys.readouterr().err
    assert image.read_bytes() == before

"""What a user of a bucket sees: exit codes, messages on stderr, one line of JSON on stdout."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infra.services import object_store
from tests.pipelines.cli_in_process import Told, pretrain_words
from tests.pipelines.training.test_init_from import write_own

pytestmark = [pytest.mark.services, pytest.mark.usefixtures("as_it_was", "in_store")]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with object_store(tmp_path_factory.mktemp("object-store")) as environment:
        yield environment


@pytest.fixture
def in_store(as_it_was: None, store: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in store.items():
        monkeypatch.setenv(name, value)


def test_weights_in_a_bucket_are_shown_and_converted(
    mae: Callable[..., Told],
    tmp_path: Path,
) -> None:
    write_own(tmp_path / "own")
    place = "s3://mae/weights"
    steps = [
        (str(tmp_path / "own"), f"{place}/a.pth", "fair"),
        (f"{place}/a.pth", f"{place}/hf", "hf"),
        (f"{place}/hf", f"{place}/own", "mae"),
        (f"{place}/own", str(tmp_path / "b.safetensors"), "timm"),
    ]
    for source, target, layout in steps:
        told = mae("checkpoint", "convert", source, target, "--to", layout)
        assert (told.code, told.out) == (0, f"{target}\n"), told.err
    for target in [target for _, target, _ in steps]:
        assert "vit_micro: 192 wide, 6 deep" in mae("checkpoint", "show", target).out
    told = mae("checkpoint", "convert", str(tmp_path / "own"), f"{place}/a.pth", "--to", "fair")
    assert told.code == 2
    assert f"{place}/a.pth: exists; give another place, or --overwrite" in told.err
    assert mae("checkpoint", "show", f"{place}/gone.pth").code == 2


def test_a_missing_bucket_is_exit_code_5(
    mae: Callable[..., Told],
    tmp_path: Path,
) -> None:
    told = mae(*pretrain_words(tmp_path, "s3://no-such-bucket/train"))
    assert (told.code, told.out) == (5, "")
    assert told.err.startswith("infrastructure error: ")
    assert "there is no bucket 'no-such-bucket'" in told.err


def test_an_empty_prefix_is_exit_code_4(
    mae: Callable[..., Told],
    tmp_path: Path,
) -> None:
    told = mae(*pretrain_words(tmp_path, "s3://data/nothing/here"))
    assert told.code == 4
    assert told.err.startswith("data error: no *.tar file matches s3://data/nothing/here")


def test_a_wrong_secret_is_exit_code_5(
    mae: Callable[..., Told],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong" * 8)
    told = mae(*pretrain_words(tmp_path, "s3://data/train"))
    assert (told.code, told.out) == (5, "")
    assert "check AWS_SECRET_ACCESS_KEY" in told.err
    assert "wrongwrong" not in told.err

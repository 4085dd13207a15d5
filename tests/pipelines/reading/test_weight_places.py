"""Which files belong to weights from elsewhere."""

import hashlib
import json
from pathlib import Path

import pytest

from mae_core.checkpoint_manifest import CorruptCheckpointError
from pipelines.reading.weight_places import content_digest, weight_files


def test_a_file_stands_for_itself_and_has_its_own_sha256(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(b"abc")
    (tmp_path / "link.pth").symlink_to("a.pth")
    for name in ("a.pth", "link.pth"):
        files = weight_files(str(tmp_path / name))
        assert files == {name: 3}
        assert content_digest(str(tmp_path / name), files) == hashlib.sha256(b"abc").hexdigest()


def test_a_folder_has_its_json_files_and_one_set_of_weights(tmp_path: Path) -> None:
    for name in ("config.json", "preprocessor_config.json", "model.safetensors", "README.md"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "pytorch_model.bin").write_text("x")
    files = weight_files(str(tmp_path))
    assert files is not None
    assert list(files) == ["config.json", "preprocessor_config.json", "model.safetensors"]
    before = content_digest(str(tmp_path), files)
    (tmp_path / "preprocessor_config.json").write_text("[]")
    assert content_digest(str(tmp_path), files) != before


def write_index(folder: Path, names: object) -> None:
    (folder / "config.json").write_text("{}")
    index = {"weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_weights_over_several_files_are_those_of_the_index(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    with pytest.raises(CorruptCheckpointError, match=r"model-1.safetensors: is missing"):
        weight_files(str(tmp_path))
    for number in (1, 2, 3):
        (tmp_path / f"model-{number}.safetensors").write_text("x")
    files = weight_files(str(tmp_path))
    assert files is not None
    assert list(files)[2:] == ["model-1.safetensors", "model-2.safetensors"]


@pytest.mark.parametrize(
    "names", [{"a": "../x"}, {"a": "/etc/passwd"}, {"a": "b/c"}, {"a": 3}, ["a"], None]
)
def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, names: object) -> None:
    write_index(tmp_path, names)
    with pytest.raises(CorruptCheckpointError, match=r"index.json: weight_map"):
        weight_files(str(tmp_path))


def test_a_folder_without_weights_and_nothing_at_all_are_none(tmp_path: Path) -> None:
    assert weight_files(str(tmp_path)) is None
    (tmp_path / "config.json").write_text("{}")
    assert weight_files(str(tmp_path)) is None
    assert weight_files(str(tmp_path / "nothing")) is None

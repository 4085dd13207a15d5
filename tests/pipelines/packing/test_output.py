"""The output of `mae prepare`: whose it is, what `fresh` may delete, and what is finished."""

from pathlib import Path
from typing import Any

import pytest

from infra.own_files import DamagedFileError
from pipelines.outcome import ConfigError
from pipelines.packing.output import SetPlan, claim_output, finished_manifest
from tests.pipelines.packed_sets import pack


def plan(output: Path, **facts: Any) -> SetPlan:
    return SetPlan(str(output), (), None, 3, None, {"images": 2, **facts, "digest": f"d{facts}"})


def test_an_output_belongs_to_the_first_plan(tmp_path: Path) -> None:
    claim_output(plan(tmp_path / "out"), fresh=False)
    claim_output(plan(tmp_path / "out"), fresh=False)
    with pytest.raises(ConfigError, match=r"with another config \(images: 2 -> 3\)"):
        claim_output(plan(tmp_path / "out", images=3), fresh=False)
    claim_output(plan(tmp_path / "out", images=3), fresh=True)
    claim_output(plan(tmp_path / "out", images=3), fresh=False)


def test_a_plan_with_other_files_alone_says_so(tmp_path: Path) -> None:
    claim_output(plan(tmp_path / "out"), fresh=False)
    other = plan(tmp_path / "out")._replace(facts={"images": 2, "digest": "e"})
    with pytest.raises(ConfigError, match="the files differ"):
        claim_output(other, fresh=False)


@pytest.mark.parametrize("text", ["{", "[]", "", "3"])
def test_a_damaged_plan_is_told(text: str, tmp_path: Path) -> None:
    claim_output(plan(tmp_path / "out"), fresh=False)
    (tmp_path / "out/.prepare/plan.json").write_text(text)
    with pytest.raises(DamagedFileError, match=r"plan\.json is damaged .*--fresh"):
        claim_output(plan(tmp_path / "out"), fresh=False)


@pytest.mark.parametrize("name", ["other.tar", "manifest.json"])
def test_shards_of_others_are_not_written_beside(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"theirs")
    with pytest.raises(ConfigError, match=f"shards from another source, such as {name}"):
        claim_output(plan(tmp_path), fresh=False)
    with pytest.raises(ConfigError, match="did not write"):
        claim_output(plan(tmp_path), fresh=True)
    assert (tmp_path / name).read_bytes() == b"theirs"


def test_a_set_is_finished_while_all_its_files_are_whole(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "out", samples_per_shard=20)
    packed = plan(tmp_path / "out")
    manifest = finished_manifest(packed)
    assert manifest is not None
    assert manifest.num_samples == 30
    index = tmp_path / "out" / manifest.shards[0].index
    content = index.read_bytes()
    index.unlink()
    assert finished_manifest(packed) is None
    index.write_bytes(content)
    tar = tmp_path / "out" / manifest.shards[1].path
    tar.write_bytes(tar.read_bytes()[:-512])
    assert finished_manifest(packed) is None


def test_nothing_is_finished_before_there_is_a_manifest(tmp_path: Path) -> None:
    assert finished_manifest(plan(tmp_path)) is None

import logging
from pathlib import Path
from typing import NamedTuple

import pytest

from infra.own_files import DamagedFileError, read_or_none, read_own


class Facts(NamedTuple):
    name: str
    values: dict[str, float]


DAMAGES = [
    (b"", "it is empty"),
    (b"  \n", "it is empty"),
    (b'{"name": "a", "val', "Invalid JSON"),
    (b"\xff\xfe\x00", "Invalid JSON"),
    (b"null", "array or an object"),
    (b"[1, 2]", "string"),
    (b'{"name": "a"}', "values: .*required"),
    (b'{"name": "a", "values": {"x": "much"}}', "values.x: .*number"),
    (b'{"name": "a", "values": {}, "more": 1}', "more"),
]


@pytest.mark.parametrize(("data", "problem"), DAMAGES)
def test_a_damaged_file_is_named_with_what_is_wrong_and_what_to_do(
    data: bytes, problem: str, tmp_path: Path
) -> None:
    file = tmp_path / "facts.json"
    file.write_bytes(data)
    with pytest.raises(
        DamagedFileError, match=rf"facts\.json is damaged \(.*({problem}).*\); restore it"
    ):
        read_own(str(file), Facts, "restore it")
    assert file.read_bytes() == data


def test_what_can_be_made_anew_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "facts.json"
    file.write_bytes(b"{")
    with caplog.at_level(logging.WARNING):
        assert read_or_none(str(file), Facts, "it is measured again") is None
    assert f"{file} is damaged (Invalid JSON" in caplog.text
    assert "it is measured again" in caplog.text


def test_a_whole_file_is_read_and_a_missing_one_is_none(tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    assert read_own(str(file), Facts, "") is None
    file.write_text('{"name": "a", "values": {"x": 1}}')
    assert read_own(str(file), Facts, "") == Facts("a", {"x": 1.0})

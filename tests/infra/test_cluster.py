import re
from pathlib import Path

import pytest

from infra.cluster import ClusterConfigError, load_cluster


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image: mae:1\nimagee: x", "imagee: Extra inputs"),
        ("image: mae", "image: .*has no fixed version"),
        ("image: mae:latest", "not latest"),
        ("image: host:80/mae", "has no fixed version"),
        ("{}", "image: Field required"),
        ("image: mae:1\nname: Mae", "name: "),
        (f"image: mae:1\nname: {'x' * 25}", "name: .*at most 24"),
        ("image: mae:1\nname: mae\\n", "name: "),
        ("image: mae:1\ncpu_workers: {gpus: 1}", "cpu_workers.gpus must be 0"),
        ("image: mae:1\ngpu_workers: {gpus: 1, min_workers: 9}", "min_workers=9 > max_workers=4"),
        ("image: mae:1\nstorage: {root: runs}", "storage.root: "),
        ("image: [", "while parsing"),
    ],
)
def test_a_wrong_config_is_told_with_its_file_and_key(
    text: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    with pytest.raises(ClusterConfigError) as raised:
        load_cluster(file)
    assert re.search(rf"{re.escape(str(file))}\W.*{message}", str(raised.value), re.DOTALL)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClusterConfigError, match=r"cluster\.yaml: no such file"):
        load_cluster(tmp_path / "cluster.yaml")


def test_each_mistake_has_a_line(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("image: mae:1\nhead: {cpus: 0}\njob: {retries: -1}\n")
    with pytest.raises(ClusterConfigError) as raised:
        load_cluster(file)
    lines = str(raised.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{file} head.cpus", f"{file} job.retries"]


def test_numbers_without_quotes_are_text_where_text_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("image: mae:2\nstorage: {region: 010}\n")
    assert load_cluster(file).storage.region == "010"

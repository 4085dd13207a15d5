"""What the guides quote of the program's output is what the program says."""

import re
from pathlib import Path

import pytest

from pipelines.outcome import EXIT_CODES

ROOT = Path(__file__).parents[2]
RUN_GUIDE = (ROOT / "docs/guides/run.md").read_text()
DATA_GUIDE = (ROOT / "docs/guides/data.md").read_text()


def source(path: str) -> str:
    """Return a file's text with each string that goes over several lines in one piece."""
    return re.sub(r'"\s*\n\s*f?"', "", (ROOT / path).read_text())


def test_the_line_of_a_stopped_run() -> None:
    quoted = re.findall(r"^stopped (.+)$", RUN_GUIDE, re.MULTILINE)
    said = source("pipelines/training/recording.py")
    assert len(quoted) == 3
    for line in quoted:
        with_names = line.replace("213", "{step}").replace("200", "{step}")
        assert with_names.replace("500", "{total_steps}") in said


def test_the_progress_line() -> None:
    (line,) = re.findall(r"^step \d.+ eta=.+$", RUN_GUIDE, re.MULTILINE)
    said = source("pipelines/training/reporting.py")
    words = re.findall(r"([\w/]+)=", line)
    assert words == ["epoch", "loss", "lr", "images/s", "data_wait", "bad", "eta"]
    assert [word for word in words if f"{word}=" not in said] == []


@pytest.mark.parametrize("code", sorted({code for code, _ in EXIT_CODES.values()}))
def test_every_exit_code_is_in_the_guide(code: int) -> None:
    assert re.search(rf"^\| {code} \| ", RUN_GUIDE, re.MULTILINE)


def test_every_metric_of_the_guide_is_recorded() -> None:
    code = "".join(path.read_text() for path in (ROOT / "pipelines").rglob("*.py"))
    task, probes = (
        source("pipelines/training/pretrain_task.py"),
        source("pipelines/training/knn.py"),
    )
    encoders = re.findall(r'"(top1\w*)": ', task)
    assert 'f"{METRICS_PREFIX}{name}": ' in probes
    assert 'f"{LINEAR_PREFIX}{name}": ' in probes
    recorded = code.replace("{METRICS_PREFIX}", "knn/")
    recorded += "".join(f'"knn/{name}" "linear/{name}"' for name in encoders)
    health = re.findall(r'\("(\w+)", ', source("pipelines/training/health.py"))
    recorded += "".join(f'"health/{name}"' for name in health)
    assert 'f"train/loss_{name}": ' in source("pipelines/training/reporting.py")
    terms = re.findall(r'found\["(\w+)"\] = ', source("mae_core/losses.py"))
    recorded += "".join(f'"train/loss_{name}"' for name in ("mse", *terms))
    named = set(
        re.findall(r"`((?:train|worker|knn|linear|data|health)/\w+)`", RUN_GUIDE + DATA_GUIDE)
    )
    assert {"train/loss", "worker/bad_samples", "knn/top1"} <= named
    assert sorted(name for name in named if f'"{name}"' not in recorded) == []


def test_every_kind_of_broken_sample_is_in_the_guide() -> None:
    in_code = (ROOT / "mae_core/data/pixels.py").read_text()
    listed = re.search(r"by `kind`: ([\w,\s]+)\.", in_code)
    assert listed is not None
    table = DATA_GUIDE[DATA_GUIDE.index("| Kind | Meaning |") :]
    rows = re.findall(r"^\| (`[^|]+`) \|", table, re.MULTILINE)
    in_guide = set(re.findall(r"`(\w+)`", " ".join(rows)))
    assert in_guide == {*re.split(r",\s+", listed[1]), "checksum", "damaged"}

"""What a user sees: exit codes, messages on stderr, one line of JSON on stdout."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines import cli, driver, prepare, pretrain
from pipelines.chain.kinds import KINDS
from pipelines.commands.arguments import STAGE_WORDS
from pipelines.config.fields import describe
from pipelines.config.prepare import PrepareConfig
from pipelines.config.pretrain import PretrainConfig
from pipelines.outcome import StageResult
from pipelines.training import launch
from tests.pipelines.cli_in_process import Told, pretrain_words

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("as_it_was")


def test_a_failure_is_one_line_of_json_for_a_program_and_none_for_a_person(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["pretrain", "optim.epohcs=1"]) == 2
    assert json.loads(capsys.readouterr().out) == {
        "stage": "pretrain",
        "status": "failed",
        "error": "data.train: is needed; give it in a file or as data.train=...\n"
        "command line optim.epohcs: no such key; did you mean optim.epochs?",
        "can_pass": False,
    }
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert cli.main(["pretrain", "optim.epohcs=1"]) == 2
    assert capsys.readouterr().out == ""


def test_a_misspelt_key_is_exit_code_2_with_the_nearest_name(
    mae: Callable[..., Told], tmp_path: Path
) -> None:
    told = mae(*pretrain_words(tmp_path, "/d", "optim.epohcs=3"))
    assert (told.code, told.out) == (2, "")
    assert told.err == (
        "config error: command line optim.epohcs: no such key; did you mean optim.epochs?\n"
    )


def test_a_misspelt_key_of_a_file_is_told_by_line(mae: Callable[..., Told], tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("data: {train: /d}\noptim:\n  lrr: 1\n")
    told = mae("pretrain", "x.yaml")
    assert told.code == 2
    assert told.err.startswith("config error: x.yaml:3 optim.lrr: no such key; ")


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("optim.epochs=many", "optim.epochs: Input should be a valid number"),
        ("optim.global_batch_size=9", "optim.global_batch_size=9 is not a multiple of"),
        ("model.img_size=30", "img_size=30x30 is not a multiple of patch_size=16"),
        (
            "masking.mask_ratio=1.5",
            "masking.mask_ratio: mask_ratio=1.5: give a share between 0 and 1",
        ),
        ("data.train=gs://b/x", "data.train: 'gs://b/x': only local paths and s3://"),
        ("seed", "'seed' is neither a .yaml file nor section.key=value"),
        ("none.yaml", "none.yaml: no such file"),
    ],
)
def test_a_mistake_in_the_config_is_exit_code_2(
    mae: Callable[..., Told], tmp_path: Path, word: str, told: str
) -> None:
    result = mae(*pretrain_words(tmp_path, "/d", word))
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("config error: ")
    assert told in result.err


def test_missing_data_is_asked_for(mae: Callable[..., Told]) -> None:
    told = mae("pretrain")
    assert told.code == 2
    assert told.err == (
        "config error: data.train: is needed; give it in a file or as data.train=...\n"
    )


def test_more_workers_than_cpus_are_refused(
    mae: Callable[..., Told], tmp_path: Path, foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(launch.machine, "count_cpus", lambda: 2)
    told = mae(
        *pretrain_words(tmp_path, foreign, "scaling.num_workers=4", "optim.micro_batch_size=2"),
        "optim.epochs=4",
    )
    assert told.code == 2
    assert told.err.splitlines()[-1] == (
        "config error: scaling.num_workers=4 x scaling.cpus_per_worker=1 needs 4 CPUs, "
        "this machine has 2; try scaling.num_workers=2"
    )


def test_a_mistake_beside_fresh_does_not_cost_the_run_that_is_there(
    mae: Callable[..., Told], tmp_path: Path, foreign: Path
) -> None:
    given = pretrain_words(tmp_path, foreign, "optim.global_batch_size=64", "optim.epochs=1")
    assert mae(*given).code == 2  # too little data, found after the index was made
    (run,) = (tmp_path / "runs/pretrain").iterdir()
    (run / "checkpoints/step-00000005").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    assert mae(*given, "--fresh").code == 2
    assert (run / "run.json").exists()
    assert (run / "checkpoints/step-00000005").exists()


def test_too_little_data_for_one_step_is_refused(
    mae: Callable[..., Told], tmp_path: Path, foreign: Path
) -> None:
    told = mae(*pretrain_words(tmp_path, foreign, "optim.global_batch_size=64", "optim.epochs=1"))
    assert told.code == 2
    assert "optim.epochs=1 of 16 samples is less than one optim.global_batch_size=64" in told.err


def test_a_missing_folder_is_exit_code_4_and_says_what_is_near(
    mae: Callable[..., Told], tmp_path: Path, foreign: Path
) -> None:
    told = mae(*pretrain_words(tmp_path, f"{foreign}s"))
    assert (told.code, told.out) == (4, "")
    assert told.err == (
        f"data error: no *.tar file matches {foreign}s: there is no {foreign}s; "
        f"{tmp_path} holds foreign/\n"
    )


def test_an_empty_folder_is_exit_code_4(mae: Callable[..., Told], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    told = mae(*pretrain_words(tmp_path, tmp_path / "empty"))
    assert told.code == 4
    assert told.err.startswith(f"data error: no *.tar file matches {tmp_path}/empty")


def test_a_tar_without_images_is_exit_code_4(
    mae: Callable[..., Told], tmp_path: Path, write_tar: Callable[..., Path]
) -> None:
    write_tar(tmp_path / "t/a.tar", {"x.txt": b"words"})
    told = mae(*pretrain_words(tmp_path, tmp_path / "t"))
    assert told.code == 4
    assert "1 tars, but no sample with an image" in told.err


def test_a_cut_tar_is_exit_code_4_and_named(
    mae: Callable[..., Told], tmp_path: Path, foreign: Path
) -> None:
    file = foreign / "part-1.tar"
    file.write_bytes(file.read_bytes()[:3000])
    told = mae(*pretrain_words(tmp_path, foreign))
    assert told.code == 4
    assert str(file) in told.err


def test_a_result_is_one_line_of_json(
    mae: Callable[..., Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def run(config: PretrainConfig, *, fresh: bool) -> StageResult:
        given.extend([config.optim.epochs, fresh])
        return StageResult("pretrain", "done", "abc", "/out/step-1", {"knn/top1": 0.5})

    monkeypatch.setattr(pretrain, "run", run)
    # Options among the words.
    told = mae("pretrain", "data.train=/d", "--fresh", "optim.epochs=3")
    assert told.code == 0
    fields = json.loads(told.out.splitlines()[-1])
    assert list(fields) == ["stage", "status", "run_id", "output", "metrics", "seconds"]
    assert fields.pop("seconds") < 5
    assert fields == {
        "stage": "pretrain",
        "status": "done",
        "run_id": "abc",
        "output": "/out/step-1",
        "metrics": {"knn/top1": 0.5},
    }
    assert given == [3.0, True]


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        (driver.CancelledError(15), 143, ""),
        (driver.CancelledError(2), 130, ""),
        (KeyboardInterrupt(), 130, ""),
        (ZeroDivisionError("x"), 1, "error: ZeroDivisionError: x; --debug shows where\n"),
    ],
)
def test_how_a_stage_ends_is_the_exit_code(
    mae: Callable[..., Told],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    last: str,
) -> None:
    def run(*_: object, **__: object) -> StageResult:
        raise error

    monkeypatch.setattr(pretrain, "run", run)
    told = mae("pretrain", "data.train=/d")
    assert (told.code, told.out, told.err) == (code, "", last)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (driver.CancelledError(15), "stopped by SIGTERM"),
        (driver.CancelledError(2), "stopped by SIGINT"),
        (KeyboardInterrupt(), "stopped by SIGINT"),
        (SystemExit(15), "stopped by SIGTERM"),  # while Ray starts, which takes the signal
    ],
)
def test_a_program_is_told_that_a_stopped_command_can_continue(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    told: str,
) -> None:
    def run(*_: object, **__: object) -> StageResult:
        raise error

    monkeypatch.setattr(pretrain, "run", run)
    assert cli.main(["pretrain", "data.train=/d"]) in (130, 143)
    assert json.loads(capsys.readouterr().out) == {
        "stage": "pretrain",
        "status": "stopped",
        "error": told,
        "can_pass": True,
    }


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("prepare", "mae prepare PICTURES OUT; mae prepare --help shows the other ways"),
        ("prepare index", "which tars? mae prepare index TARS"),
        ("prepare stats", "which tars? mae prepare stats TARS"),
        ("embed search", "which image is searched for? mae embed search IMAGE ..."),
    ],
)
def test_a_command_without_its_words_says_which_it_needs(
    mae: Callable[..., Told], words: str, told: str
) -> None:
    ended = mae(*words.split())
    assert (ended.code, ended.out, ended.err) == (2, "", f"config error: {told}\n")


OWN_STAGE = """
from mae_core.config import StrictConfig
from pipelines.outcome import StageResult

class Config(StrictConfig):
    folder: str = "{self}"

def run(config, *, fresh):
    return StageResult("own", "done", None, config.folder, {})
"""


def test_a_stage_of_ones_own_gets_no_folder_called_self(
    mae: Callable[..., Told], tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(OWN_STAGE)
    told = mae("stage", f"{tmp_path}/own.py")
    assert (told.code, told.out) == (2, "")
    assert told.err == (
        "config error: folder={self}: {self} is the stage's folder in a pipeline; run alone, the "
        "stage needs folder=FOLDER\n"
    )
    assert mae("stage", f"{tmp_path}/own.py", "folder=/out").code == 0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "no such file"),
        ("x = 1\n", "needs a class Config(StrictConfig) from mae_core.config"),
        ("def f(:\n", "can't be imported: SyntaxError: "),
        ("import nowhere\n", "can't be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ("# A page\n\nNot code.\n", "can't be imported: SyntaxError: "),
    ],
)
@pytest.mark.parametrize("words", [("stage",), ("config", "show")])
def test_a_file_that_is_no_stage_is_a_config_error(
    mae: Callable[..., Told], tmp_path: Path, words: tuple[str, ...], text: str | None, told: str
) -> None:
    file = tmp_path / "own.py"
    if text is not None:
        file.write_text(text)
    ended = mae(*words, str(file))
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"config error: {file}: {told}")


def test_only_the_missing_word_is_called_required(mae: Callable[..., Told]) -> None:
    told = mae("run")
    assert told.code == 2
    assert told.err.endswith("the following arguments are required: CHAIN.yaml\n")


def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run(*_: object, **__: object) -> StageResult:
        raise ZeroDivisionError("x")

    monkeypatch.setattr(pretrain, "run", run)
    assert cli.main(["pretrain", "data.train=/d", "--debug"]) == 1
    assert "ZeroDivisionError: x" in caplog.text
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("stage", sorted(KINDS))
def test_help_lists_every_field(mae: Callable[..., Told], stage: str) -> None:
    told = mae(stage, "--help")
    assert told.code == 0
    for key, kind, default, _ in describe(KINDS[stage].config_type):
        assert f"  {key}  {kind}  [{default}]\n" in told.out


def test_an_unknown_option_or_stage_is_exit_code_2(mae: Callable[..., Told]) -> None:
    told = mae("pretrain", "--frsh")
    assert told.code == 2
    assert "unknown option --frsh; did you mean --fresh?" in told.err
    told = mae("pretrain", "--zzz")
    assert "unknown option --zzz; `mae pretrain --help` lists them" in told.err
    told = mae("pretrian")
    assert told.code == 2
    assert "there is no stage 'pretrian'; did you mean pretrain? `mae` lists them" in told.err
    assert "there is no stage 'xyz'; `mae` lists them" in mae("xyz").err


def test_without_a_word_every_stage_is_listed_with_a_line(mae: Callable[..., Told]) -> None:
    told = mae()
    assert told.code == 2
    lines = {line.split()[0]: line for line in told.out.splitlines() if line.startswith("    ")}
    assert set(STAGE_WORDS) <= set(lines)
    assert lines["prepare"].endswith("Pack images into shards, or draw a small data set.")


def test_the_version_is_the_packages(mae: Callable[..., Told]) -> None:
    told = mae("--version")
    assert (told.code, told.out) == (0, f"mae {importlib.metadata.version('mae-pipeline')}\n")


def test_help_shows_what_can_stand_without_a_key(mae: Callable[..., Told]) -> None:
    told = mae("prepare", "--help").out
    assert "mae prepare PICTURES OUT" in told
    assert "mae prepare index TARS" in told
    assert "mae prepare stats TARS" in told
    assert "mae embed search IMAGE init_from=CHECKPOINT" in mae("embed", "--help").out


@pytest.mark.parametrize("stage", sorted(KINDS))
def test_help_tells_types_in_words(mae: Callable[..., Told], stage: str) -> None:
    told = mae(stage, "--help").out
    assert not re.search(r"Optional|Literal|tuple|\bdict\b|Union|\bstr\b|\bNone\b", told)


def test_help_and_a_config_error_import_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from pipelines import cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = ('torch', 'ray', 'mlflow', 'numpy', 'pyarrow', 'boto3', 'PIL')\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    for words in (["--help"], ["completion", "bash"], ["pretrain", "data.train=/d", "a=1"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.stderr.splitlines()[-1] == "[]"


def test_a_plan_imports_neither_torch_nor_ray_nor_mlflow(tmp_path: Path) -> None:
    """It is asked often, and each of these takes seconds."""
    code = (
        "import sys; from pipelines import cli\n"
        "heavy = ('torch', 'timm', 'torchvision', 'ray', 'mlflow', 'boto3', 'matplotlib')\n"
        "print(cli.main(sys.argv[1:]), [x for x in heavy if x in sys.modules], file=sys.stderr)"
    )
    chain = f"{ROOT}/configs/chain/demo.yaml"
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", chain, "--set", f"storage.root={tmp_path}/runs"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stderr.splitlines()[-1] == "0 []", done.stderr


def test_a_path_with_an_equals_sign_is_a_path(
    mae: Callable[..., Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[PrepareConfig] = []

    def run(config: PrepareConfig, *, fresh: bool) -> StageResult:
        seen.append(config)
        return StageResult("prepare", "done", None, config.output, {})

    monkeypatch.setattr(prepare, "run", run)
    Path("split=1").mkdir()
    Path("a.yaml").mkdir()
    assert mae("prepare", "split=1", "a.yaml").code == 2, "a key is a key"
    Path("lr=1").mkdir()
    assert mae("prepare", "lr=1", "a.yaml").code == 0
    assert (seen[0].source, seen[0].output) == ("lr=1", "a.yaml")
    assert "source: is empty" in mae("prepare", "", "out").err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["IMAGES", "OUT"], {"source": "IMAGES", "output": "OUT", "synthetic": None}),
        (
            ["--synthetic", "shapes", "OUT"],
            {"source": None, "output": "OUT", "synthetic": "shapes"},
        ),
        (["synthetic=shapes", "output=OUT"], {"source": None, "output": "OUT"}),
        (["IMAGES", "OUT", "split=val", "seed=3"], {"split": "val", "seed": 3}),
    ],
)
def test_prepare_takes_folders_as_words(
    mae: Callable[..., Told],
    monkeypatch: pytest.MonkeyPatch,
    given: list[str],
    expected: dict[str, Any],
) -> None:
    seen: list[PrepareConfig] = []

    def run(config: PrepareConfig, *, fresh: bool) -> StageResult:
        seen.append(config)
        return StageResult("prepare", "done", None, config.output, {})

    monkeypatch.setattr(prepare, "run", run)
    assert mae("prepare", *given).code == 0
    assert expected.items() <= seen[0].model_dump().items()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["A", "B", "C"], "too many words: A B C; expected SOURCE OUTPUT"),
        (["--synthetic", "shapes", "A", "B"], "too many words: A B; expected OUTPUT"),
        (["A"], "output: is needed; give it in a file or as output=..."),
        (["output=OUT"], "give one of source=FOLDER, synthetic=shapes, existing"),
    ],
)
def test_prepare_says_which_words_are_wrong(
    mae: Callable[..., Told], given: list[str], told: str
) -> None:
    result = mae("prepare", *given)
    assert result.code == 2
    assert told in result.err


def test_a_stage_s_file_runs_from_any_folder_and_helps_at_once(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "pipelines/pretrain.py"), "--help"]
    started = os.times()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    ended = os.times()
    assert "optim.global_batch_size  whole number  [4096]" in done.stdout
    # CPU time, for the machine may be busy: torch and Ray alone would take 5 s of it.
    spent = (ended.children_user + ended.children_system) - (
        started.children_user + started.children_system
    )
    assert spent < 2


@pytest.mark.parametrize("stage", sorted(KINDS))
def test_a_stage_s_file_can_be_executed(stage: str) -> None:
    file = ROOT / f"pipelines/{stage}.py"
    assert os.access(file, os.X_OK)
    assert file.read_text().startswith("#!/usr/bin/env python\n")

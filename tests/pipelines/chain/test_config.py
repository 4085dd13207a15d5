"""A pipeline's file: references, overrides, sweeps, user-defined stages, and mistakes in it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.chain.config import Chain, after, load_chain, substitute
from pipelines.outcome import ConfigError

OWN_STAGE = '''
"""Counts to a number."""
from mae_core.config import StrictConfig
from pipelines.outcome import StageResult


class Config(StrictConfig):
    number: int = 1
    label: str = ""
    workers: int = 1
    folder: str = "{self}"


UNKEYED = ("workers",)
VERSION = 3


def run(config: Config, *, fresh: bool) -> StageResult:
    return StageResult("count", "done", None, config.folder, {"number": config.number})
'''


@pytest.fixture
def stage_file(tmp_path: Path) -> Path:
    file = tmp_path / "count.py"
    file.write_text(OWN_STAGE)
    return file


def write(folder: Path, stages: dict[str, Any], **fields: Any) -> Path:
    file = folder / "chain.yaml"
    file.write_text(yaml.safe_dump({"name": "c", "stages": stages, **fields}, sort_keys=False))
    return file


def small(folder: Path) -> Path:
    """Write a pipeline: prepare -> pretrain -> classify."""
    return write(
        folder,
        {
            "classify": {
                "set": {
                    "init_from": "{pretrain}",
                    "data.train": "{prepare}/train",
                    "data.val": "{prepare}/val",
                }
            },
            "prepare": {"set": {"synthetic": "shapes", "output": "{self}/shapes"}},
            "pretrain": {"set": {"data.train": "{prepare}/train"}},
        },
    )


def names(chain: Chain) -> list[str]:
    return [stage.name for stage in chain.stages]


def test_stages_come_in_order_whatever_the_file_says(tmp_path: Path) -> None:
    chain = load_chain(small(tmp_path))
    assert names(chain) == ["prepare", "pretrain", "classify"]
    assert chain["classify"].needs == ("pretrain", "prepare")
    assert chain["prepare"].needs == ()


def test_words_reach_the_pipeline_and_its_stages(tmp_path: Path) -> None:
    words = ["storage.root=/x", "pretrain.optim.base_lr=1e-3", "pretrain.scaling.num_workers=4"]
    chain = load_chain(small(tmp_path), words)
    assert chain.config.storage.root == "/x"
    config = chain["pretrain"].config
    assert config.model_dump()["optim"]["base_lr"] == 0.001
    assert config.model_dump()["storage"]["root"] == "{self}", "a stage keeps to its own folder"
    assert chain["pretrain"].node.cpus == 4


def test_a_stages_run_has_its_name(tmp_path: Path) -> None:
    chain = load_chain(small(tmp_path), sweeps=["pretrain.optim.base_lr=1,2"])
    assert [s.config.model_dump().get("name") for s in chain.stages] == [
        None,
        "pretrain-base_lr-1",
        "pretrain-base_lr-2",
        "classify-base_lr-1",
        "classify-base_lr-2",
    ]


def test_resources_of_the_file_are_not_the_stages_config(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        {"prepare": {"cpus": 7, "retries": 0, "timeout_s": 5, "set": {"output": "x"}}},
    )
    with pytest.raises(ConfigError, match="give one of source"):
        load_chain(file)
    chain = load_chain(file, ["prepare.synthetic=shapes"])
    node = chain["prepare"].node
    assert (node.cpus, node.retries, node.timeout_s) == (7, 0, 5)


def test_a_sweep_copies_what_it_changes_and_what_comes_after(tmp_path: Path) -> None:
    chain = load_chain(small(tmp_path), sweeps=["masking.mask_ratio=0.5,0.75"])
    assert names(chain) == [
        "prepare",
        "pretrain@mask_ratio=0.5",
        "pretrain@mask_ratio=0.75",
        "classify@mask_ratio=0.5",
        "classify@mask_ratio=0.75",
    ]
    values = [chain[n].config.model_dump()["masking"]["mask_ratio"] for n in names(chain)[1:3]]
    assert values == [0.5, 0.75]
    assert chain["classify@mask_ratio=0.75"].needs == ("pretrain@mask_ratio=0.75", "prepare")


def test_sweeps_make_a_grid(tmp_path: Path) -> None:
    sweeps = ["pretrain.optim.base_lr=1,2", "classify.classify.k=3,4,5"]
    chain = load_chain(small(tmp_path), sweeps=sweeps)
    assert len(names(chain)) == 1 + 6 + 6


def test_a_sweep_of_no_stages_field_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no stage has such a field"):
        load_chain(small(tmp_path), sweeps=["k=3,4"])


@pytest.mark.parametrize("word", ["optim.base_lr", "optim.base_lr=", "optim.base_lr=1,1", "=1,2"])
def test_a_sweep_that_is_none_is_refused(tmp_path: Path, word: str) -> None:
    with pytest.raises(ConfigError, match="--sweep"):
        load_chain(small(tmp_path), sweeps=[word])


def test_all_that_needs_a_stage_comes_after_it(tmp_path: Path) -> None:
    chain = load_chain(small(tmp_path))
    assert after(["pretrain"], chain) == {"pretrain", "classify"}
    assert after(["prepare"], chain) == {"prepare", "pretrain", "classify"}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"pretrain": {"set": {"data.train": "{prepar}/x"}}}, "no stage 'prepar'.*{prepar}"),
        ({"train": {}}, "stages.train.stage: there is no stage 'train'.*pretrain"),
        ({"a": {"stage": "nowhere.py"}}, "stages.a.stage=nowhere.py: no such file"),
        ({"pretrain": {"needs": ["x"], "set": {"data.train": "d"}}}, "needs 'x'"),
        ({"pretrain": {"set": {"data.train": "d", "optim.lr": 1}}}, "stages.pretrain: .*optim.lr"),
        ({"pretrain": {}}, "stages.pretrain: data.train: is needed"),
        ({"self": {}}, "'self' can't be a stage's name"),
        ({"Big": {}}, "'Big' can't be a stage's name"),
        ({}, "at least one stage"),
        ({"prepare": {"retry": 1}}, "retry: no such key"),
    ],
)
def test_a_mistake_names_the_stage_and_the_key(
    tmp_path: Path, stages: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_chain(write(tmp_path, stages))


def test_a_word_for_no_stage_names_the_stages(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the stages are classify, prepare, pretrain"):
        load_chain(small(tmp_path), ["optim.base_lr=1"])


def test_promotion_must_name_stages_that_are_there(tmp_path: Path) -> None:
    promote = {"model": "m", "metric": "detect/ap"}
    file = write(tmp_path, {"pretrain": {"set": {"data.train": "d"}}}, promote=promote)
    with pytest.raises(ConfigError, match="there is no stage 'detect'"):
        load_chain(file)


def test_a_stage_of_ones_own_is_one_file(tmp_path: Path, stage_file: Path) -> None:
    chain = load_chain(write(tmp_path, {"mine": {"stage": str(stage_file), "set": {"number": 7}}}))
    stage = chain["mine"]
    assert stage.kind_name == "count"
    assert stage.kind.version == 3
    assert stage.kind.summary == "Counts to a number."
    assert stage.config.model_dump()["number"] == 7
    with pytest.raises(ConfigError, match=r"stages\.mine: .*numbr"):
        load_chain(write(tmp_path, {"mine": {"stage": str(stage_file), "set": {"numbr": 7}}}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("X = 1\n", "needs a class Config"),
        ("from mae_core.config import StrictConfig as Config\n", "needs a function run"),
    ],
)
def test_a_file_that_is_no_stage_is_told_so(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_chain(write(tmp_path, {"a": {"stage": str(file)}}))


def test_only_names_of_stages_are_replaced() -> None:
    texts = {"a": "/x", "a@lr=1,b=2": "/y"}
    value = {"k": ["{a}/t-{000000..000009}.tar", "{a,b}.tar", 3], "s": "{a@lr=1,b=2}/v {other}"}
    assert substitute(value, texts) == {
        "k": ["/x/t-{000000..000009}.tar", "{a,b}.tar", 3],
        "s": "/y/v {other}",
    }


def test_text_in_a_file_words_and_sweeps_reaches_text_fields_as_it_was_typed(
    tmp_path: Path,
) -> None:
    file = small(tmp_path)
    text = file.read_text().replace("synthetic: shapes", "synthetic: shapes\n      split: 007")
    file.write_text(text.replace("'007'", "007"))
    words = ["classify.classify.label_key=on", "pretrain.data.val=set #2"]
    chain = load_chain(file, words, ["pretrain.init_from=0x10,1_000"])
    assert chain["prepare"].config.model_dump()["split"] == "007"
    assert [s.config.model_dump()["init_from"] for s in chain.stages if "pretrain@" in s.name] == [
        "0x10",
        "1_000",
    ]
    pretrain = chain["pretrain@init_from=1_000"].config.model_dump()
    assert pretrain["data"]["val"] == "set #2"
    classify = chain["classify@init_from=1_000"].config.model_dump()
    assert classify["classify"]["label_key"] == "on"


def test_a_path_beyond_ascii_comes_through(tmp_path: Path) -> None:
    chain = load_chain(small(tmp_path), ["pretrain.data.train=/\U0001f600/ü"])
    assert chain["pretrain"].config.model_dump()["data"]["train"] == "/\U0001f600/ü"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: c\nstages:\n  a: {stage: prepare}\n  a: {}\n", "chain.yaml:4 a: is in line 3"),
        (
            "name: c\nstages:\n  pretrain:\n    set:\n      optim.epochs: 1\n"
            "      optim: {epochs: 2}\n",
            "chain.yaml:6 stages.pretrain.set: optim.epochs is in ",
        ),
        (
            "name: c\nstages:\n  pretrain:\n    set: {data.train: x}\n    needs: [a]\n"
            "    set: {seed: 1}\n",
            "chain.yaml:6 set: is in line 4 already",
        ),
        (
            "name: c\nstages:\n  pretrain:\n    set:\n      data.train: x\n      sed: 1\n",
            "chain.yaml:6 sed: no such key; did you mean seed?",
        ),
    ],
)
def test_what_a_pipelines_file_says_twice_or_wrongly_is_told_by_its_line(
    tmp_path: Path, text: str, told: str
) -> None:
    file = tmp_path / "chain.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_chain(file)
    assert told in str(caught.value)


@pytest.mark.parametrize("elsewhere", ["", "elsewhere"])
def test_files_are_found_from_any_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: str
) -> None:
    folder = tmp_path / "clone/configs/chain"
    folder.mkdir(parents=True)
    own = tmp_path / "clone/configs/own.yaml"
    own.write_text("synthetic: shapes\noutput: o\nimg_size: 32\n")
    file = write(folder, {"prepare": {"files": ["configs/own.yaml"]}})
    here = tmp_path / "clone" if not elsewhere else tmp_path / elsewhere
    here.mkdir(exist_ok=True)
    monkeypatch.chdir(here)
    assert load_chain(file)["prepare"].config.model_dump()["img_size"] == 32

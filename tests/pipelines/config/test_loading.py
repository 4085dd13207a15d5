"""Parsing words, variables and files: what each field accepts, and what is refused."""

from pathlib import Path

import pytest

from pipelines.config.downstream import ClassifyConfig, DetectConfig
from pipelines.config.loading import Given, load_config, load_with_origins
from pipelines.config.prepare import PrepareConfig
from pipelines.config.pretrain import PretrainConfig
from pipelines.outcome import ConfigError

BATCH = ("optim.global_batch_size=64",)


def pretrain(*words: str, **environment: str) -> PretrainConfig:
    return load_config(PretrainConfig, [], ["data.train=/d", *BATCH, *words], environment)


def mistake(file: Path, text: str) -> str:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(PretrainConfig, [file], BATCH, {})
    return str(caught.value).replace(str(file), "run.yaml")


@pytest.mark.parametrize("name", ["2024", "on", "010", "1e3", "1_000", "0x10", "2024-01-01", "no"])
def test_a_name_of_digits_is_a_name_wherever_it_is_written(tmp_path: Path, name: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"data: {{train: /d}}\nname: {name}\n")
    assert pretrain(f"name={name}").name == name
    assert pretrain(MAE__NAME=name).name == name
    assert load_config(PretrainConfig, [file], BATCH, {}).name == name


def test_paths_with_hashes_and_colons_are_taken_as_they_are() -> None:
    assert pretrain("data.train=set #2").data.train == "set #2"
    assert pretrain(MAE__INIT_FROM="set #2: b").init_from == "set #2: b"
    assert pretrain("data.train=[a #1, 2024]").data.train == ("a #1", "2024")
    assert pretrain(MAE__DATA__VAL="[2024, 08]").data.val == ("2024", "08")
    assert pretrain("init_from={pretrain}").init_from == "{pretrain}"


def test_class_names_that_yaml_takes_for_no_are_names(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("classify: {names: [no, yes, 1], label_key: on}\ndata: {train: a, val: 1}\n")
    words = ["init_from=/c", "optim.global_batch_size=64"]
    config = load_config(ClassifyConfig, [file], words, {})
    assert config.classify.names == ("no", "yes", "1")
    assert (config.classify.label_key, config.data.val) == ("on", "1")
    detect = load_config(
        DetectConfig, [], [*words, "data.train=a", "data.val=b", "detect.categories={1: no}"], {}
    )
    assert detect.detect.categories == {1: "no"}


def test_a_value_that_may_be_left_out_can_be_taken_back() -> None:
    assert pretrain("data.val=/v", "data.val=null").data.val is None
    assert pretrain("data.val=~").data.val is None
    assert pretrain("data.val='null'").data.val == "null"


def test_numbers_are_decimal_and_no_words() -> None:
    assert pretrain("seed=010").seed == 10
    for word in ("seed=1:30", "seed=on", "optim.epochs=yes", "seed=2024-13-45"):
        with pytest.raises(ConfigError, match=r"command line .*valid"):
            pretrain(word)


def test_an_empty_value_is_told() -> None:
    with pytest.raises(ConfigError, match=r"command line storage\.root: .*; it is empty"):
        pretrain("storage.root=")


def test_sections_given_as_a_word_are_merged() -> None:
    optim = pretrain("optim.epochs=3", "optim={base_lr: 0.5}").optim
    assert (optim.epochs, optim.base_lr) == (3.0, 0.5)
    with pytest.raises(ConfigError, match="command line optim: epochs: is in line 1 already"):
        pretrain("optim={epochs: 1, epochs: 2}")


def test_a_section_given_twice_is_an_error_with_both_lines(tmp_path: Path) -> None:
    text = "data: {train: x}\noptim:\n  epochs: 5\nseed: 1\noptim:\n  base_lr: 1.0e-3\n"
    assert mistake(tmp_path / "run.yaml", text) == "run.yaml:5 optim: is in line 2 already"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("data: {train: {prepare}}\n", "put quotes around {prepare}, which YAML reads as a"),
        ("data:\n  train: set #2\n", "run.yaml:2 'set' is followed by '#2': put the whole in"),
        ("data: {train: x}\nname:\n", "run.yaml:2 name: Input should be a valid string; it is em"),
        ("data: {train: x}\nzzz: 1\n", "run.yaml:2 zzz: no such key; there are: name, seed, data"),
        ("data: {train: x}\nseed: &s [*s]\n", "run.yaml:2 has an alias of itself within"),
    ],
)
def test_what_a_file_can_not_mean_is_told_by_its_line(tmp_path: Path, text: str, told: str) -> None:
    assert told in mistake(tmp_path / "run.yaml", text)


def test_a_file_is_compared_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text("")
    with pytest.raises(ConfigError) as caught:
        load_config(PretrainConfig, [tmp_path / "vit_large.yaml"], [], {})
    assert str(caught.value) == f"{tmp_path}/vit_large.yaml: no such file"


def test_a_long_value_is_shown_by_its_beginning() -> None:
    with pytest.raises(ConfigError) as caught:
        pretrain("seed=" + "9" * 5000)
    assert len(str(caught.value)) < 300


def test_anchors_of_a_file_serve_several_sections(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: {train: x, crop_scale: &s [0.5, 1]}\noptim: {betas: *s, epochs: 3}\n")
    config, origins = load_with_origins(PretrainConfig, [file], ["optim.betas=[0.5, 0.9]"], {})
    assert config.optim.betas == (0.5, 0.9)
    assert origins["optim.epochs"] == f"{file}:2"


def test_what_is_given_by_a_program_is_taken_as_it_is() -> None:
    given = [Given("source", "null", "here"), Given("output", "[a, 'b']", "here")]
    config = load_config(PrepareConfig, [], given, {})
    assert (config.source, config.output) == ("null", "[a, 'b']")

"""Files, environment and words become one config; each error has its place and name."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.fields import describe, flatten
from pipelines.config.loading import load_config
from pipelines.config.prepare import PrepareConfig
from pipelines.config.pretrain import PretrainConfig
from pipelines.outcome import ConfigError

NEEDED = ("data.train=/data", "optim.global_batch_size=64")


def make_config(*words: str, environment: dict[str, str] | None = None) -> PretrainConfig:
    return load_config(PretrainConfig, [], [*NEEDED, *words], environment or {})


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def mistake(*words: str, files: tuple[Path, ...] = (), environment: Any = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(PretrainConfig, files, words, environment or {})
    return str(caught.value)


@pytest.mark.parametrize(("text", "value"), [("1e-3", 0.001), ("1.5e4", 15000.0), ("0.5", 0.5)])
def test_a_number_with_an_exponent_is_a_number(tmp_path: Path, text: str, value: float) -> None:
    file = write(tmp_path, f"data: {{train: /data}}\noptim:\n  base_lr: {text}\n")
    assert load_config(PretrainConfig, [file], [], {}).optim.base_lr == value
    assert make_config(f"optim.base_lr={text}").optim.base_lr == value


def test_later_files_win_and_keep_what_they_do_not_name(tmp_path: Path) -> None:
    first = write(tmp_path, "data: {train: /a}\noptim: {epochs: 7, base_lr: 0.5}\n", "a.yaml")
    second = write(tmp_path, "optim: {epochs: 9}\n", "b.yaml")
    config = load_config(PretrainConfig, [first, second], [], {})
    assert (config.optim.epochs, config.optim.base_lr) == (9.0, 0.5)


def test_the_environment_comes_between_files_and_words(tmp_path: Path) -> None:
    file = write(tmp_path, "seed: 1\nname: from_file\n")
    environment = {"MAE__SEED": "2", "MAE__OPTIM__EPOCHS": "3", "MAE__NAME": "from_environment"}
    config = load_config(PretrainConfig, [file], [*NEEDED, "seed=4"], environment)
    assert (config.seed, config.optim.epochs, config.name) == (4, 3.0, "from_environment")


def test_what_another_stage_reads_from_the_environment_is_no_mistake() -> None:
    environment = {"MAE__OUTPUT": "/out", "MAE__SAMPLES_PER_SHARD": "3", "HOME": "/root"}
    assert make_config(environment=environment) == make_config()


def test_a_misspelt_variable_is_named() -> None:
    told = mistake(*NEEDED, environment={"MAE__OPTIM__EPOHCS": "3"})
    assert told == (
        "environment MAE__OPTIM__EPOHCS optim.epohcs: no such key; did you mean optim.epochs?"
    )


def test_a_misspelt_key_in_a_file_is_told_by_line_with_the_nearest_name(tmp_path: Path) -> None:
    file = write(tmp_path, "# a comment\ndata:\n  train: /data\noptim:\n  base_lrr: 1.0e-3\n")
    assert mistake(files=(file,)) == (
        f"{file}:5 optim.base_lrr: no such key; did you mean optim.base_lr?"
    )


def test_a_key_in_the_wrong_section_is_found_in_the_right_one() -> None:
    assert mistake(*NEEDED, "data.mask_ratio=0.5") == (
        "command line data.mask_ratio: no such key; did you mean masking.mask_ratio?"
    )


def test_a_key_like_no_other_gets_a_list() -> None:
    told = mistake(*NEEDED, "knn.qqqqqq=1")
    assert (
        told == "command line knn.qqqqqq: no such key; there are: k, max_train, max_val, max_linear"
    )


def test_a_value_of_the_wrong_type_is_shown(tmp_path: Path) -> None:
    file = write(tmp_path, "data: {train: /data}\noptim:\n  epochs: many\n")
    told = mistake(files=(file,))
    assert told.startswith(f"{file}:3 optim.epochs: Input should be a valid number")
    assert told.endswith("not 'many'")


def test_all_mistakes_are_told_at_once() -> None:
    told = mistake(*NEEDED, "sed=1", "optim.epochs=many", "masking.mask_ratio=1.5")
    assert len(told.splitlines()) == 3


@pytest.mark.parametrize("value", ["nan", ".nan", ".inf"])
def test_numbers_that_are_none_are_refused(value: str) -> None:
    assert "optim.base_lr" in mistake(*NEEDED, f"optim.base_lr={value}")


def test_missing_data_is_asked_for() -> None:
    assert mistake() == "data.train: is needed; give it in a file or as data.train=..."
    assert mistake("data.flip=false") == (
        "data.train: is needed; give it in a file or as data.train=..."
    )


@pytest.mark.parametrize(
    ("word", "train"),
    [
        ("data.train={000000..000003}.tar", "{000000..000003}.tar"),
        ("data.train=s3://b/train-{000000..000003}.tar", "s3://b/train-{000000..000003}.tar"),
        ("data.train=[/a, s3://b/c]", ("/a", "s3://b/c")),
        ("data.train=/a=b", "/a=b"),
    ],
)
def test_patterns_and_lists_can_be_given_as_words(word: str, train: Any) -> None:
    assert make_config(word).data.train == train


def test_a_word_without_a_value_is_refused() -> None:
    assert mistake(*NEEDED, "seed") == "'seed' is neither a YAML file nor section.key=value"


def test_a_file_that_is_not_there_is_told_with_the_nearest(tmp_path: Path) -> None:
    near = write(tmp_path, "", "demo.yaml")
    file = tmp_path / "dmo.yaml"
    assert mistake(files=(file,)) == f"{file}: no such file; did you mean {near}?"


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "just words", "\0"])
def test_a_file_that_is_no_config_is_told_by_name(tmp_path: Path, text: str) -> None:
    file = write(tmp_path, text)
    assert mistake(files=(file,)).startswith(f"{file}:")


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    file = write(tmp_path, "# only a comment\n")
    assert load_config(PretrainConfig, [file], NEEDED, {}) == make_config()


def test_a_batch_that_does_not_divide_is_told_in_numbers() -> None:
    assert mistake(
        "data.train=/d",
        "optim.global_batch_size=100",
        "optim.micro_batch_size=64",
        "scaling.num_workers=2",
    ) == (
        "config: optim.global_batch_size=100 is not a multiple of "
        "optim.micro_batch_size=64 x scaling.num_workers=2"
    )
    assert mistake(*NEEDED, "data.shuffle_window=100") == (
        "config: data.shuffle_window=100 is not a multiple of the images of a micro batch, 64: "
        "optim.micro_batch_size=64 / data.crops_per_image=1"
    )
    assert mistake(*NEEDED, "data.crops_per_image=3", "optim.micro_batch_size=64") == (
        "config: optim.micro_batch_size=64 is not a multiple of data.crops_per_image=3"
    )


def test_an_image_that_patches_do_not_tile_is_told_in_numbers() -> None:
    told = mistake(*NEEDED, "model.img_size=30", "model.patch_size=16")
    assert told == "command line model: img_size=30x30 is not a multiple of patch_size=16" or (
        told == "model: img_size=30x30 is not a multiple of patch_size=16"
    )


@pytest.mark.parametrize(
    ("workers", "micro", "steps"), [(1, 64, 8), (2, 64, 4), (4, 32, 4), (8, 64, 1)]
)
def test_the_rest_of_the_global_batch_is_accumulated(workers: int, micro: int, steps: int) -> None:
    config = make_config(
        "optim.global_batch_size=512",
        f"optim.micro_batch_size={micro}",
        f"scaling.num_workers={workers}",
    )
    assert config.grad_accum_steps == steps


@pytest.mark.parametrize(
    "word",
    [
        "seed=1",
        "data.train=/other",
        "data.shuffle_window=2048",
        "data.crop_scale=[0.5, 1.0]",
        "data.flip=false",
        "data.stats=imagenet",
        "model.encoder=vit_tiny",
        "masking.mask_ratio=0.5",
        "masking.kind=block",
        "loss.norm_pix=false",
        "optim.base_lr=1e-3",
        "optim.epochs=3",
        "optim.max_steps=3",
        "optim.precision=fp32",
        "init_from=/checkpoint",
        "name=other",
    ],
)
def test_what_determines_the_result_makes_another_run(word: str) -> None:
    assert make_config(word).run_name != make_config().run_name


@pytest.mark.parametrize(
    "word",
    [
        "data.val=/val",
        "data.decode=cluster",
        "data.max_bad_ratio=0.5",
        "optim.micro_batch_size=32",
        "optim.compile=true",
        "scaling.num_workers=1",
        "scaling.cpus_per_worker=4",
        "scaling.use_gpu=true",
        "checkpoint.every_steps=3",
        "reporting.every_steps=3",
        "knn.k=3",
        "storage.root=/elsewhere",
        "tracking.experiment=other",
        "debug.sample_trace=/trace",
    ],
)
def test_what_does_not_determine_the_result_is_the_same_run(word: str) -> None:
    assert make_config(word).run_name == make_config().run_name


def test_a_run_name_is_the_same_in_every_process() -> None:
    assert make_config().run_name == "pretrain-ed5f1f8d"


def test_flattened_values_are_text_under_dotted_keys() -> None:
    flat = flatten(make_config("data.train=[/a, /b]"))
    assert flat["optim.global_batch_size"] == "64"
    assert flat["data.train"] == '["/a", "/b"]'
    assert flat["model.img_size"] == "[224, 224]"
    assert flat["model.encoder"] == "vit_base"
    assert flat["model.decoder.dim"] == "512"
    assert flat["init_from"] == "null"


@pytest.mark.parametrize("config_type", [PretrainConfig, PrepareConfig])
def test_every_field_is_described(config_type: Any) -> None:
    rows = list(describe(config_type))
    assert len(rows) > 10
    assert [key for key, _, _, meaning in rows if not meaning] == []


def test_a_config_survives_the_way_to_a_worker() -> None:
    config = make_config("data.train=[/a, /b]", "model.img_size=[32, 64]", "model.patch_size=8")
    assert PretrainConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_config_loads_without_torch_and_ray() -> None:
    code = (
        "import sys, pipelines.config.loading\n"
        "print([m for m in ('torch', 'ray', 'mlflow', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("words", "batch", "micro", "window"),
    [
        (["optim.micro_batch_size=50"], 4100, 50, 1050),
        (["optim.global_batch_size=100", "scaling.num_workers=2"], 100, 50, 1050),
        (["optim.global_batch_size=32"], 32, 32, 1024),
        (["scaling.num_workers=3"], 4224, 64, 1024),
        (["data.crops_per_image=3"], 4158, 63, 1029),
        (["optim.global_batch_size=96", "data.crops_per_image=3"], 96, 48, 1024),
        (["optim.global_batch_size=512", "optim.micro_batch_size=32"], 512, 32, 1024),
    ],
)
def test_what_was_not_set_fits_what_was(
    words: list[str], batch: int, micro: int, window: int
) -> None:
    config = load_config(PretrainConfig, [], ["data.train=/d", *words], {})
    assert config.optim.global_batch_size == batch
    assert config.optim.micro_batch_size == micro
    assert config.data.shuffle_window == window
    assert PretrainConfig.model_validate(config.model_dump(mode="json")) == config


def test_what_was_set_is_never_changed() -> None:
    assert "data.shuffle_window=1024 is not a multiple" in mistake(
        "data.train=/d", "optim.micro_batch_size=50", "data.shuffle_window=1024"
    )
    assert "optim.global_batch_size=64 is not a multiple" in mistake(
        *NEEDED, "optim.micro_batch_size=50"
    )


@pytest.mark.parametrize("size", ["32", "[32]", "[32, 32]"])
def test_a_square_is_given_by_one_side(size: str) -> None:
    assert make_config(f"model.img_size={size}").model.img_size == (32, 32)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("checkpoint.keep_best=health/loss",), "measured on data.val, which is not given"),
        (
            ("checkpoint.keep_best=health/rank", "health.every_epochs=0"),
            "is not measured: health.every_epochs is 0",
        ),
        (("checkpoint.keep_best=health/los",), "health/loss"),
    ],
)
def test_a_best_checkpoint_needs_its_metric(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(*words)
    assert make_config("checkpoint.keep_best=health/rank").checkpoint.keep_best == "health/rank"


@pytest.mark.parametrize(("encoder", "is_same"), [("convnextv2_atto", True), ("resnet18", False)])
def test_a_micro_batch_names_the_run_of_an_encoder_with_batch_norms(
    encoder: str, is_same: bool
) -> None:
    words = (*NEEDED, f"model.encoder={encoder}", "optim.global_batch_size=64")
    names = {make_config(*words, f"optim.micro_batch_size={n}").run_name for n in (16, 32)}
    assert (len(names) == 1) is is_same


def test_a_stride_that_leaves_one_place_is_told() -> None:
    assert mistake(*NEEDED, "model.encoder=resnet18", "model.img_size=32") == (
        "config: masking.mask_ratio=0.75 removes none of 1 patches of model.patch_size=32"
    )

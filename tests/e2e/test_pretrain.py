"""A run from shards to a model in MLflow, and what the same command does afterwards."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow.pytorch
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from mae_core.data.samples import DataError
from mae_core.training_error import NonFiniteLossError
from pipelines.outcome import ConfigError
from pipelines.training import pretrain_run
from tests.e2e.conftest import assert_golden

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.usefixtures("local_ray")
def test_a_finished_run_is_in_mlflow_with_all_that_belongs_to_it(
    place: Any, started: Callable[..., Any]
) -> None:
    """As a command: the model is exported without the tests' shape checks."""
    process = started("optim.epochs=2", f"data.val={place.shapes}/val", "knn.k=5")
    out, _ = process.communicate(timeout=500)
    assert process.returncode == 0, place.stderr()
    result = json.loads(out.splitlines()[-1])
    assert list(result) == ["stage", "status", "run_id", "output", "metrics", "seconds"]
    assert (result["stage"], result["status"]) == ("pretrain", "done")
    assert result["output"].endswith("checkpoints/step-00000012")
    assert {n for n in result["metrics"] if not n.startswith("health/")} == {
        "knn/top1",
        "knn/top1_untrained",
        "linear/top1",
        "linear/top1_untrained",
        "linear/top1_pixels",
        "data/left_out",
    }
    assert "Traceback" not in place.stderr()

    client = MlflowClient(place.tracking_uri)
    run = client.get_run(result["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.global_batch_size"] == "16"
    assert run.data.params["model.decoder.dim"] == "32"
    assert run.data.tags["stage"] == "pretrain"
    assert run.data.metrics["train/samples_seen"] == 192.0
    assert run.data.metrics["train/epoch"] == 2.0
    assert run.data.metrics["knn/top1"] == result["metrics"]["knn/top1"]
    assert sorted(place.losses(result["run_id"])) == list(range(1, 13))
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.name == "train"
    assert [tag.value for tag in dataset.tags] == ["pretrain"]
    assert any("reconstruction" in a.path for a in client.list_artifacts(run.info.run_id, "images"))
    assert [a.path for a in client.list_artifacts(run.info.run_id, "checkpoint")] == [
        "checkpoint/manifest.json"
    ]

    run_folder = Path(result["output"]).parents[1]
    with Image.open(run_folder / "reconstruction.png") as picture:
        assert picture.width > 16
    (model,) = client.search_logged_models([run.info.experiment_id])
    encoder = mlflow.pytorch.load_model(model.artifact_location)
    for batch in (1, 5):
        features = encoder(torch.zeros(batch, 3, 16, 16))
        assert features.shape == (batch, 17, 192)  # a class token and 4 x 4 patches


def test_the_numbers_of_a_run_stay_what_they_are(undisturbed: Any) -> None:
    place, run_id = undisturbed.place, undisturbed.result.run_id
    assert_golden("pretrain/loss", undisturbed.losses)
    assert_golden("pretrain/learning_rate", place.losses(run_id, "train/learning_rate"))


@pytest.mark.usefixtures("no_model_export", "local_ray")
def test_a_finished_run_is_not_trained_again_unless_fresh(
    undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, trained = undisturbed.place, []
    original = pretrain_run.fit
    monkeypatch.setattr(pretrain_run, "fit", lambda *a: (trained.append(1), original(*a)))

    again = place.run()
    assert again == undisturbed.result._replace(status="reused")
    # Where and how it runs is not what it is.
    assert place.run("scaling.num_workers=2", "checkpoint.every_steps=7").status == "reused"
    assert trained == []


def test_a_finished_run_is_found_without_torch_ray_and_mlflow(undisturbed: Any) -> None:
    code = (
        "import sys; from pipelines import cli\n"
        "heavy = ('torch', 'timm', 'torchvision', 'ray', 'mlflow')\n"
        "print(cli.main(sys.argv[1:]), [x for x in heavy if x in sys.modules], file=sys.stderr)"
    )
    words = undisturbed.place.words()
    done = subprocess.run(
        [sys.executable, "-c", code, "pretrain", *words], capture_output=True, text=True
    )
    assert json.loads(done.stdout.splitlines()[-1])["status"] == "reused"
    assert done.stderr.splitlines()[-1] == "0 []"


@pytest.mark.usefixtures("no_model_export", "local_ray")
def test_fresh_trains_again_to_the_same_weights(place: Any) -> None:
    words = ("optim.max_steps=3",)
    first = place.run(*words)
    weights = (Path(first.output) / "model.safetensors").read_bytes()
    fresh = place.run(*words, fresh=True)
    assert (first.status, fresh.status) == ("done", "done")
    assert fresh.run_id != first.run_id
    assert (Path(fresh.output) / "model.safetensors").read_bytes() == weights


@pytest.mark.usefixtures("no_model_export", "local_ray")
def test_a_damaged_newest_checkpoint_costs_a_warning_and_not_the_result(
    place: Any, undisturbed: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """As if the run had been killed at its end, and the last checkpoint had been cut."""
    done = Path(undisturbed.result.output).parents[1]
    run = place.folder / "runs/pretrain" / done.name
    shutil.copytree(done, run)
    for name in ("result.json", "run.json"):
        (run / name).unlink()
    weights = run / "checkpoints/step-00000030/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])

    result = place.run(f"data.train={undisturbed.place.shapes}/train")
    assert result.status == "done"
    assert {line["step"] for line in place.trace()} == set(range(26, 31))
    assert "step-00000030 is not complete" in capfd.readouterr().err
    again = Path(result.output) / "model.safetensors"
    assert (
        again.read_bytes() == (Path(undisturbed.result.output) / "model.safetensors").read_bytes()
    )


@pytest.mark.usefixtures("no_model_export", "local_ray")
def test_a_run_that_was_stopped_after_its_last_step_just_ends(place: Any, undisturbed: Any) -> None:
    done = Path(undisturbed.result.output).parents[1]
    run = place.folder / "runs/pretrain" / done.name
    shutil.copytree(done, run)
    (run / "result.json").unlink()
    (run / "run.json").unlink()
    result = place.run()
    assert result.status == "done"
    assert place.trace() == []


@pytest.mark.usefixtures("no_model_export", "local_ray")
def test_a_finished_run_is_measured_anew_without_training(place: Any, undisturbed: Any) -> None:
    """An evaluation that fails costs the result nothing; the next one is computed alone."""
    done = Path(undisturbed.result.output).parents[1]
    run = place.folder / "runs/pretrain" / done.name
    shutil.copytree(done, run)
    broken = repack(place.shapes / "val", place.folder / "broken", lambda _, data: data[:9])
    with pytest.raises(DataError, match="nothing for the kNN evaluation"):
        place.run(f"data.val={broken}", "health.every_epochs=0")
    kept = json.loads((run / "result.json").read_text())
    assert kept["metrics"] == {"data/left_out": 0}
    assert Path(kept["output"]) == run / "checkpoints/step-00000030"

    words = (f"data.val={place.shapes}/val", "knn.k=5", "health.every_epochs=0")
    measured = place.run(*words)
    assert measured.status == "evaluated"
    assert {"knn/top1", "knn/top1_untrained", "data/left_out"} <= set(measured.metrics)
    assert place.run(*words) == measured._replace(status="reused")
    # What was not asked for is not handed back.
    assert place.run("health.every_epochs=0").metrics == {"data/left_out": 0}
    assert place.trace() == []


def repack(folder: Path, target: Path, change: Callable[[int, bytes], bytes]) -> Path:
    """The set without a manifest, each image changed by (number, bytes)."""
    target.mkdir()
    number = 0
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as source, tarfile.open(target / shard.name, "w") as out:
            for member in source.getmembers():
                file = source.extractfile(member)
                assert file is not None
                data = file.read()
                if member.name.endswith((".png", ".jpg")) and ".seg." not in member.name:
                    data = change(number, data)
                    number += 1
                member.size = len(data)
                out.addfile(member, io.BytesIO(data))
    return target


@pytest.mark.usefixtures("no_model_export", "local_ray")
def test_changed_data_is_refused_until_fresh(place: Any) -> None:
    data = place.folder / "data"
    shutil.copytree(place.shapes / "train", data)
    words = (f"data.train={data}", "optim.max_steps=2")
    place.run(*words)
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["shards"] = manifest["shards"][:4]
    (data / "manifest.json").write_text(json.dumps(manifest))
    (data / "train-000004.tar").unlink()
    with pytest.raises(DataError, match=r"data .* changed since this run began"):
        place.run(*words)
    assert place.run(*words, fresh=True).status == "done"


@pytest.mark.usefixtures("no_model_export", "local_ray")
def test_several_crops_of_an_image_fill_a_batch_and_go_on_after_a_stop(place: Any) -> None:
    """Batches of 16 hold 8 images: 12 steps read the 96 images once."""
    words = ("data.crops_per_image=2", "optim.epochs=2", "optim.warmup_epochs=0.5")
    result = place.run(*words)
    trace = place.trace()
    assert len(trace) == 96
    assert len({line["key"] for line in trace}) == 96
    assert {line["epoch"] for line in trace} == {0}
    weights = (Path(result.output) / "model.safetensors").read_bytes()
    run = Path(result.output).parents[1]
    for gone in (run / "checkpoints/step-00000012", run / "result.json"):
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    again = place.run(*words)  # from step 10 on
    assert {line["step"] for line in place.trace() if line["attempt"] == 2} == {11, 12}
    assert (Path(again.output) / "model.safetensors").read_bytes() == weights


@pytest.mark.usefixtures("no_model_export", "local_ray")
def test_broken_images_are_left_out_and_named(
    place: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    data = repack(
        place.shapes / "train", place.folder / "d", lambda n, b: b"broken" if n == 7 else b
    )
    result = place.run(f"data.train={data}", "optim.epochs=1", "data.max_bad_ratio=0.5")
    assert result.status == "done"
    assert len(place.trace()) == 95
    assert "left out: shard=" in capfd.readouterr().err
    assert result.metrics["data/left_out"] == 1
    client = MlflowClient(place.tracking_uri)
    assert client.get_run(result.run_id).data.metrics["worker/bad_samples"] == 1.0
    mlflow.set_tracking_uri(place.tracking_uri)
    listed = mlflow.artifacts.load_text(f"runs:/{result.run_id}/bad_samples.jsonl")
    (line,) = map(json.loads, listed.splitlines())
    assert (line["kind"], Path(line["shard"]).parent) == ("not_an_image", data)


@pytest.mark.usefixtures("no_model_export", "local_ray")
def test_too_many_broken_images_end_the_run_at_once(place: Any) -> None:
    data = repack(
        place.shapes / "train", place.folder / "d", lambda n, b: b"broken" if n % 4 else b
    )
    with pytest.raises(
        DataError, match=r"of 1000 samples can't be used, more than .* x not_an_image"
    ):
        place.run(f"data.train={data}", "optim.epochs=3")
    # Not tried again: what is broken stays so.
    assert {line["attempt"] for line in place.trace()} == {1}
    (run,) = MlflowClient(place.tracking_uri).search_runs(["1"])
    assert run.info.status == "FAILED"


@pytest.mark.usefixtures("no_model_export", "local_ray")
def test_a_loss_that_is_no_number_ends_the_run_at_once(place: Any) -> None:
    with pytest.raises(NonFiniteLossError):
        place.run("optim.base_lr=1e38", "optim.warmup_epochs=0", "optim.epochs=2")
    assert {line["attempt"] for line in place.trace()} == {1}
    (run,) = MlflowClient(place.tracking_uri).search_runs(["1"])
    assert run.info.status == "FAILED"


@pytest.mark.usefixtures("no_model_export", "local_ray")
def test_a_dead_mlflow_costs_a_warning(
    place: Any, undisturbed: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    result = place.run("tracking.uri=http://127.0.0.1:1", "optim.max_steps=6")
    assert (result.status, result.run_id) == ("done", None)
    assert "this run is not recorded" in capfd.readouterr().err


@pytest.mark.usefixtures("no_model_export", "local_ray")
def test_a_run_starts_from_given_weights(place: Any, undisturbed: Any) -> None:
    result = place.run(f"init_from={undisturbed.result.output}", "optim.max_steps=2")
    losses = place.losses(result.run_id)
    assert losses[1] < undisturbed.losses[1] - 0.2


@pytest.mark.usefixtures("no_model_export", "local_ray")
@pytest.mark.parametrize("where", ["missing", "other-model"])
def test_weights_that_can_not_be_used_are_a_config_error_before_training(
    place: Any, undisturbed: Any, where: str
) -> None:
    words = ["init_from=/nowhere/step-1"]
    if where == "other-model":
        words = [f"init_from={undisturbed.result.output}", "model.patch_size=8"]
    with pytest.raises(ConfigError, match="init_from"):
        place.run(*words)
    assert place.trace() == []

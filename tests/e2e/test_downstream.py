"""Classify, detect, segment and embed on the drawn set: from a checkpoint to numbers and a model.

One encoder is pretrained for a few steps; what it knows does not matter here.
"""

import hashlib
import io
import json
import re
import signal
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from infra.storage import StorageError
from mae_core.checkpoint import load_encoder
from mae_core.checkpoint_manifest import verify_checkpoint
from mae_core.data.samples import DataError
from pipelines import classify, detect, embed, segment
from pipelines.config.downstream import (
    ClassifyConfig,
    DetectConfig,
    DownstreamConfig,
    SegmentConfig,
)
from pipelines.config.embed import EmbedConfig
from pipelines.config.loading import load_config
from pipelines.outcome import ConfigError, StageResult
from pipelines.reading.shards import open_shards, read_rows
from pipelines.training import checkpoints
from tests.e2e.conftest import assert_golden

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

STAGES: dict[type[DownstreamConfig], Any] = {
    ClassifyConfig: classify,
    DetectConfig: detect,
    SegmentConfig: segment,
}
# 96 samples in batches of 16: 6 steps an epoch, 12 an arm.
WORDS = [
    "data.shuffle_window=32",
    "optim.global_batch_size=16",
    "optim.micro_batch_size=8",
    "optim.epochs=2",
    "optim.warmup_epochs=0.5",
    "checkpoint.every_steps=5",
    "reporting.every_steps=1",
]
DETECT = ["detect.strides=[4,8]", "detect.channels=32", "detect.num_convs=1"]
SHAPES = "[background,disc,ring,crescent,heart,triangle,square,star,cross,arrow,bowtie]"
SEGMENT = [f"segment.names={SHAPES}", "segment.channels=16", "img_size=16"]


@pytest.fixture(scope="session")
def encoder_uri(undisturbed: Any) -> str:
    """The checkpoint of a run of 30 steps: ViT micro, 16 pixels, patches of 4, three channels."""
    return str(undisturbed.result.output)


class Downstream:
    """Commands that run in one place."""

    def __init__(self, place: Any, encoder_uri: str) -> None:
        self.place = place
        self.encoder_uri = encoder_uri

    def words(self, *more: str) -> list[str]:
        return [
            *WORDS,
            f"init_from={self.encoder_uri}",
            f"data.train={self.place.shapes}/train",
            f"data.val={self.place.shapes}/val",
            f"storage.root={self.place.folder}/runs",
            f"tracking.uri={self.place.tracking_uri}",
            f"debug.sample_trace={self.place.trace_folder}",
            *more,
        ]

    def run(
        self, config_type: type[DownstreamConfig], *more: str, fresh: bool = False
    ) -> StageResult:
        config = load_config(config_type, [], self.words(*more), {})
        result: StageResult = STAGES[config_type].run(config, fresh=fresh)
        return result

    def losses(self, run_id: str | None, metric: str = "train/loss") -> dict[int, float]:
        assert run_id is not None
        history = MlflowClient(self.place.tracking_uri).get_metric_history(run_id, metric)
        steps = [point.step for point in history]
        assert len(set(steps)) == len(steps), "a step has two values"
        return {point.step: point.value for point in history}


@pytest.fixture
def downstream(place: Any, encoder_uri: str) -> Downstream:
    return Downstream(place, encoder_uri)


def write_samples(tar: Path, members: dict[str, bytes]) -> None:
    """A black image `one.png` and what belongs to it."""
    buffer = io.BytesIO()
    Image.new("RGB", (24, 20)).save(buffer, "PNG")
    with tarfile.open(tar, "w") as stream:
        for name, data in {"one.png": buffer.getvalue(), **members}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            stream.addfile(info, io.BytesIO(data))


def weights_sha256(output: str) -> str:
    return hashlib.sha256((Path(output) / "model.safetensors").read_bytes()).hexdigest()


def run_folder(place: Any, stage: str) -> Path:
    (folder,) = (place.folder / "runs" / stage).iterdir()
    return Path(folder)


@pytest.mark.usefixtures("local_ray")
def test_arms_shares_and_seeds_are_compared_in_one_run(downstream: Downstream) -> None:
    result = downstream.run(
        ClassifyConfig,
        "classify.arms=[knn,logistic,linear,finetune,untrained]",
        "classify.label_fraction=[0.5,1.0]",
        "classify.seeds=[0,1]",
        "optim.max_steps=2",
    )
    assert result.status == "done"
    names = {"knn", "logistic", "linear", "finetune", "untrained"}
    for key in (f"{name}-{share}/top1" for name in names for share in ("0.5", "1")):
        assert 0 <= result.metrics[key] <= 1
    # With all of the labels, nothing of the neighbours depends on a seed.
    assert {"knn-0.5/top1_std", "finetune-1/top1_std", "untrained-1/top1_std"} <= set(
        result.metrics
    )
    assert "knn-1/top1_std" not in result.metrics
    assert result.output.endswith("models/finetune-1-seed0")

    folder = run_folder(downstream.place, "classify")
    table = (folder / "summary.md").read_text()
    assert "| labels | knn | logistic | linear | finetune | untrained |" in table
    for name in ("label_fraction.png", "arms/finetune-1-seed0/most_wrong.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 200
    client = MlflowClient(downstream.place.tracking_uri)
    assert result.run_id is not None
    run = client.get_run(result.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["init_from"] == downstream.encoder_uri
    assert run.data.metrics["finetune-1/top1"] == result.metrics["finetune-1/top1"]
    assert {d.dataset.name for d in run.inputs.dataset_inputs} == {"train", "val"}
    # Each arm counts its own steps, so that curves lie over each other.
    for arm in ("finetune-0.5-seed1", "linear-1-seed0"):
        assert sorted(downstream.losses(result.run_id, f"{arm}/train/loss")) == [1, 2]
    logged = {a.path for a in client.list_artifacts(result.run_id)}
    assert {"summary.md", "finetune-1-seed0"} <= logged

    assert downstream.run(
        ClassifyConfig,
        "classify.arms=[knn,logistic,linear,finetune,untrained]",
        "classify.label_fraction=[0.5,1.0]",
        "classify.seeds=[0,1]",
        "optim.max_steps=2",
    ) == result._replace(status="reused")


@pytest.mark.usefixtures("local_ray")
def test_half_of_the_labels_trains_on_half_of_the_samples(downstream: Downstream) -> None:
    downstream.run(ClassifyConfig, "classify.arms=[finetune]", "classify.label_fraction=[0.5]")
    counted = Counter((line["epoch"], line["key"]) for line in downstream.place.trace())
    assert set(counted.values()) == {1}
    keys = {key for _, key in counted}
    assert 40 <= len(keys) <= 56  # half of each of ten classes, rounded
    assert sum(epoch == 0 for epoch, _ in counted) == len(keys)


@pytest.mark.parametrize(
    ("config_type", "words", "metric", "pictures"),
    [
        (
            DetectConfig,
            [*DETECT, "detect.head=faster_rcnn", "detect.arms=[frozen]", "optim.max_steps=2"],
            "frozen/ap50",
            {"detections.png", "precision_recall.png"},
        ),
        (
            SegmentConfig,
            [*SEGMENT, "segment.head=linear", "segment.arms=[frozen]", "segment.window=2"],
            "frozen/miou",
            {"segmentation.png"},
        ),
    ],
    ids=["faster-rcnn", "linear-windowed"],
)
@pytest.mark.usefixtures("local_ray")
def test_dense_stages_leave_numbers_pictures_and_a_model(
    downstream: Downstream,
    config_type: type[DownstreamConfig],
    words: list[str],
    metric: str,
    pictures: set[str],
) -> None:
    result = downstream.run(config_type, *words)
    assert 0 <= result.metrics[metric] <= 1
    arm = metric.partition("/")[0] + "-1-seed0"
    folder = run_folder(downstream.place, config_type.stage)
    found = {file.name for file in (folder / "arms" / arm).iterdir()}
    assert found == {*pictures, "metrics.json", "per_class.md"}
    manifest = verify_checkpoint(Path(result.output))
    assert manifest.stage == config_type.stage
    encoder, _ = load_encoder(Path(result.output))
    original, _ = load_encoder(Path(downstream.encoder_uri))
    assert torch.equal(encoder.blocks[5].mlp.fc1.weight, original.blocks[5].mlp.fc1.weight)


@pytest.mark.usefixtures("local_ray", "no_model_export")
def test_a_convolutional_encoder_is_pretrained_and_segments(downstream: Downstream) -> None:
    place = downstream.place
    words = ["model.encoder=resnet18", "optim.max_steps=2", "health.every_epochs=0"]
    pretrained = place.run(*words, "model.decoder.kind=deconvolution")
    assert list(place.losses(pretrained.run_id)) == [1, 2]
    encoder, manifest = load_encoder(Path(pretrained.output))
    assert (manifest.model.encoder, manifest.model.decoder.kind) == ("resnet18", "deconvolution")
    assert manifest.decoder_present
    place.trace_folder.rename(place.folder / "trace-of-pretrain")
    start = [f"init_from={pretrained.output}", "optim.max_steps=2"]
    result = downstream.run(SegmentConfig, *SEGMENT, *start, "segment.arms=[frozen]")
    assert 0 <= result.metrics["frozen/miou"] <= 1
    kept, _ = load_encoder(Path(result.output))
    assert all(torch.equal(kept.state_dict()[k], x) for k, x in encoder.state_dict().items())


@pytest.mark.usefixtures("local_ray")
def test_a_store_that_fails_once_costs_nothing_but_time(
    downstream: Downstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second arm: the first is not trained again, and all ends as if undisturbed."""
    arms = ("classify.arms=[finetune,scratch]", "classify.seeds=[0]")
    undisturbed = downstream.run(ClassifyConfig, *arms)
    losses = downstream.losses(undisturbed.run_id, "scratch-1-seed0/train/loss")
    assert_golden("classify/scratch/loss", losses)
    for metric in ("loss", "learning_rate"):
        curve = downstream.losses(undisturbed.run_id, f"finetune-1-seed0/train/{metric}")
        assert_golden(f"classify/finetune/{metric}", curve)
    weights = weights_sha256(undisturbed.output)
    lines = len(downstream.place.trace())

    failed, upload = [], checkpoints.transfers.upload_folder

    def upload_or_fail(local: Path, uri: str, **options: Any) -> None:
        if uri.endswith("step-00000022") and not failed:  # of 24; a checkpoint is at 17, too
            failed.append(uri)
            raise StorageError("the store is away")
        upload(local, uri, **options)

    monkeypatch.setattr(checkpoints.transfers, "upload_folder", upload_or_fail)
    again = downstream.run(ClassifyConfig, *arms, fresh=True)
    assert len(failed) == 1
    assert downstream.losses(again.run_id, "scratch-1-seed0/train/loss") == losses
    assert weights_sha256(again.output) == weights
    assert again.metrics == undisturbed.metrics
    later = downstream.place.trace()[lines:]
    assert {line["attempt"] for line in downstream.place.trace()} == {1, 2, 3}
    assert all(line["step"] > 12 for line in later if line["attempt"] == 3)


@pytest.mark.parametrize(
    ("config_type", "words", "number"),
    [
        (DetectConfig, [*DETECT, "img_size=[24,16]"], signal.SIGKILL),
        (SegmentConfig, SEGMENT, signal.SIGTERM),
    ],
    ids=["detect-killed", "segment-stopped"],
)
def test_a_driver_that_ended_leaves_a_run_that_the_same_command_finishes(
    downstream: Downstream,
    config_type: type[DownstreamConfig],
    words: list[str],
    number: int,
    started_downstream: Callable[..., Any],
    local_ray: Path,
) -> None:
    words = [*words, f"{config_type.stage}.arms=[finetune]"]
    process = started_downstream(config_type.stage, *downstream.words(*words))
    downstream.place.wait_for_step(7)  # after the checkpoint of step 5
    process.send_signal(number)
    process.wait(60)
    told = re.search(r"stopped at step (\d+) of 12; checkpoint written", downstream.place.stderr())
    assert (told is not None) is (number == signal.SIGTERM)
    result = downstream.run(config_type, *words)
    assert sorted(downstream.losses(result.run_id)) == list(range(1, 13))
    encoder, manifest = load_encoder(Path(result.output))
    assert manifest.stage == config_type.stage
    # At another size positions are stretched: the model is still one of the pretrained size.
    assert manifest.model.img_size == (16, 16)
    original, _ = load_encoder(Path(downstream.encoder_uri))
    assert not torch.equal(encoder.blocks[5].mlp.fc1.weight, original.blocks[5].mlp.fc1.weight)
    trace = downstream.place.trace()
    done = 5 if told is None else int(told[1])
    assert all(line["step"] > done for line in trace if line["attempt"] == 2)
    assert len(MlflowClient(downstream.place.tracking_uri).search_runs(["1"])) == 1


@pytest.mark.usefixtures("local_ray")
def test_two_workers_see_what_one_would(downstream: Downstream) -> None:
    words = ("classify.arms=[finetune]", "optim.max_steps=4", "classify.mixup=0")
    words = (*words, "classify.cutmix=0", "classify.random_erase=0", "optim.drop_path_rate=0")
    one = downstream.run(ClassifyConfig, *words)
    losses = downstream.losses(one.run_id)
    two = downstream.run(ClassifyConfig, *words, "scaling.num_workers=2", fresh=True)
    assert downstream.losses(two.run_id) == pytest.approx(losses, abs=1e-4)
    assert two.metrics["finetune/top1"] == pytest.approx(one.metrics["finetune/top1"], abs=0.1)


@pytest.mark.usefixtures("local_ray")
def test_features_are_written_once_and_searched(
    downstream: Downstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = downstream.place
    words = [
        f"init_from={downstream.encoder_uri}",
        f"data={place.shapes}/train",
        f"storage.root={place.folder}/runs",
        f"tracking.uri={place.tracking_uri}",
        "rows_per_file=12",
    ]
    result = embed.run(load_config(EmbedConfig, [], words, {}), fresh=False)
    files = sorted(Path(result.output).glob("*.parquet"))
    assert len(files) == 10  # shards of 20, 20, 20, 20 and 16 samples, 12 a file
    table = pq.read_table(result.output)
    assert len(table) == 96
    assert table.schema.field("feature").type.list_size == 192
    assert len(set(table["key"].to_pylist())) == 96

    # What is there is not written again; what is missing is.
    (Path(result.output).parent / "result.json").unlink()
    before = {file.name: file.stat().st_mtime_ns for file in files}
    content = files[3].read_bytes()
    files[3].unlink()
    again = embed.run(load_config(EmbedConfig, [], words, {}), fresh=False)
    assert files[3].read_bytes() == content
    after = {file.name: file.stat().st_mtime_ns for file in files}
    assert [name for name in before if before[name] != after[name]] == [files[3].name]
    assert again.metrics == result.metrics

    query = place.folder / "query.jpg"
    first = table.slice(5, 1).to_pylist()[0]
    shards = {s.path: s for s in open_shards(f"{place.shapes}/train", "unused").shards}
    (sample,) = read_rows(shards[first["shard"]], first["row"], first["row"] + 1)
    query.write_bytes(sample.image)
    config = load_config(EmbedConfig, [], [*words, f"query={query}", "num_neighbours=3"], {})
    drawn: list[list[str]] = []
    original = embed.retrieval_picture
    monkeypatch.setattr(
        embed, "retrieval_picture", lambda *a: (drawn.append([*a[2]]), original(*a))[1]
    )
    assert embed.run(config, fresh=False).status == "reused"
    (captions,) = drawn
    assert len(captions) == 3
    assert not any(caption.startswith(first["key"][-18:]) for caption in captions)
    assert all(caption.rpartition(", ")[2] in SHAPES for caption in captions)  # names
    with Image.open(Path(result.output).parent / "search-query.png") as picture:
        assert picture.width > 400


@pytest.mark.usefixtures("local_ray")
def test_a_broken_sample_is_a_counted_hole_and_too_many_stop_the_run(
    downstream: Downstream,
) -> None:
    tar = downstream.place.folder / "a.tar"
    members: dict[str, bytes] = {"one.cls": b"0"}
    for number in range(31):
        buffer = io.BytesIO()
        Image.new("RGB", (24, 20), (8 * number, 0, 0)).save(buffer, "PNG")
        whole = buffer.getvalue()
        members[f"s{number:02d}.png"] = whole[:60] if number == 7 else whole
        members[f"s{number:02d}.cls"] = str(number % 2).encode()
    write_samples(tar, members)
    words = ("classify.arms=[knn,finetune]", f"data.train={tar}", f"data.val={tar}")

    with pytest.raises(
        DataError, match=r"can't be (used|measured), more than data\.max_bad_ratio=0"
    ):
        downstream.run(ClassifyConfig, *words, "data.max_bad_ratio=0")
    result = downstream.run(ClassifyConfig, *words)
    assert result.metrics["data/left_out"] == 1
    folder = run_folder(downstream.place, "classify")
    (bad,) = [json.loads(x) for x in (folder / "bad_samples.jsonl").read_text().splitlines()]
    assert (bad["key"], bad["shard"]) == ("s07", str(tar))
    assert "s07" not in {line["key"] for line in downstream.place.trace()}
    assert result.metrics["finetune/top1"] * 31 == pytest.approx(
        round(result.metrics["finetune/top1"] * 31)
    )  # of the 31 that can be measured


def test_a_size_that_the_patches_do_not_tile_is_refused(downstream: Downstream) -> None:
    with pytest.raises(ConfigError, match=r"img_size=18x18 is not a multiple of 4, the patch_size"):
        downstream.run(ClassifyConfig, "img_size=18")


def test_a_checkpoint_that_is_none_is_refused(downstream: Downstream) -> None:
    with pytest.raises(ConfigError, match=r"init_from=/nowhere: is neither a complete checkpoint"):
        downstream.run(ClassifyConfig, "init_from=/nowhere")


@pytest.mark.realdata
def test_data_of_other_channels_are_refused_naming_both(
    downstream: Downstream, real_data: Path
) -> None:
    shards = real_data / "multichannel/landsat7_8band/train-000000.tar"
    with pytest.raises(
        ConfigError, match=r"takes in_chans=3 in patches of 4, but data\.train: .* has 8 channels"
    ):
        downstream.run(SegmentConfig, *SEGMENT, f"data.train={shards}", f"data.val={shards}")


@pytest.mark.parametrize(
    ("config_type", "words", "extension", "content", "message"),
    [
        (ClassifyConfig, [], "cls", b"cat", r"one\.cls holds 'cat'"),
        (ClassifyConfig, ["classify.names=[a,b]"], "cls", b"7", r"one: class 7, but there are 2"),
        (
            DetectConfig,
            DETECT,
            "json",
            b'{"width": 24, "height": 20, "objects": [{"bbox": [1, 2, 90, 5], "category_id": 1}]}',
            r"one: box 1 \(\[1, 2, 90, 5\]\)",
        ),
    ],
    ids=["no-number", "no-such-class", "box-outside"],
)
def test_a_wrong_label_is_named_before_anything_is_trained(
    downstream: Downstream,
    config_type: type[DownstreamConfig],
    words: list[str],
    extension: str,
    content: bytes,
    message: str,
) -> None:
    tar = downstream.place.folder / "a.tar"
    write_samples(tar, {f"one.{extension}": content})
    with pytest.raises(DataError, match=message) as error:
        downstream.run(config_type, *words, f"data.train={tar}", f"data.val={tar}")
    assert "a.tar" in str(error.value)


def test_a_wrong_label_map_stops_the_run_naming_sample_and_class(
    downstream: Downstream,
) -> None:
    names = "segment.names=[background,disc]"
    with pytest.raises(DataError, match=r"the label map has .* but the classes are 0\.\.1"):
        downstream.run(SegmentConfig, *SEGMENT, names)

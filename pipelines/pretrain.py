#!/usr/bin/env python
"""Pretrain a masked autoencoder on image shards.

    python pipelines/pretrain.py configs/pretrain/demo.yaml optim.epochs=20
    ray job submit --working-dir . -- python pipelines/pretrain.py FILE.yaml data.train=s3://...

The same command goes on where it was stopped; a finished run is not trained again.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: import the package, not the files beside this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from pipelines.cli import main

    sys.exit(main(["pretrain", *sys.argv[1:]]))

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from infra import storage, tracking
from mae_core.data.decode import decode_image
from mae_core.data.pixels import CorruptSampleError, Pixels
from mae_core.data.manifest import IMAGENET_STATS, ChannelStats, Manifest, ShardInfo
from mae_core.data.randomness import named_generator
from mae_core.data.samples import DataError
from mae_core.data.transforms import center_crop, stack_pixels
from mae_core.masking import draw_noise
from pipelines import driver
from pipelines.training import launch
from pipelines.training.checkpoints import (
    at_newest_checkpoint,
    fetch_manifest,
    find_checkpoint,
    list_steps,
)
from pipelines.reading.class_names import (
    Classes,
    classes_by_name,
    read_class_names,
    united_names,
    warn_of_unnamed,
)
from pipelines.config.pretrain import PretrainConfig
from pipelines.outcome import ConfigError, StageResult
from pipelines.reading.shards import measure_channel_stats, open_shards, read_rows
from pipelines.training.export import log_encoder
from pipelines.reading.fingerprints import fingerprint
from pipelines.training.knn import METRICS_PREFIX, check_labels
from pipelines.training.recording import (
    earlier_record,
    ended_in_mlflow,
    log_bad_samples,
    run_until_stopped,
    saved_steps,
    say_where_to_compare,
    take_over,
    tell_evaluation,
)
from pipelines.training.reporting import RunSize
from pipelines.training.run import fit
from pipelines.training.run_folder import RunFolder
from pipelines.training.pretrain_worker import Pictures, TrainTask, remaining_data, train_worker

logger = logging.getLogger(__name__)

STAGE = "pretrain"
NUM_PICTURES = 8


class OpenedData(NamedTuple):
    train: Manifest
    val: Manifest | None  # None: no kNN evaluation


class Plan(NamedTuple):
    """What the run will do, known before anything is started."""

    manifest: Manifest
    val_shards: tuple[ShardInfo, ...]
    classes: Classes
    stats: ChannelStats
    size: RunSize


def run(config: PretrainConfig, *, fresh: bool) -> StageResult:
    """Pretrain, or go on with it, or find that it is done.

    Raises:
        ConfigError, DataError, NoShardsError, StorageError: before any worker is started, unless
            only reading can tell.
    """
    driver.check_paths(_paths(config))
    driver.check_tracking(config.tracking.uri)
    config = at_newest_checkpoint(config)
    folder = RunFolder(storage.join(storage.absolute(config.storage.root), STAGE, config.run_name))
    if fresh:
        storage.delete_folder(folder.index_uri)
    _check_init_from(config)
    data = _open_data(config, folder)
    digest, inputs = data.train.digest, _inputs(config)
    earlier = None if fresh else earlier_record(folder, digest, inputs)
    done = None if fresh else folder.read_whole_result()
    key = evaluation_key(config)
    if done is not None and (kept := _kept_result(done, folder.read_evaluation(key))) is not None:
        logger.info("%s is done: not trained again (--fresh starts over)", folder.uri)
        return kept
    plan = _plan(config, data)
    if done is not None:
        logger.info("%s is trained already; its evaluation is computed anew", folder.uri)
    with launch.running_ray(config.scaling):
        folder, run_id = take_over(
            config,
            folder,
            digest=digest,
            inputs=inputs,
            earlier=earlier,
            fresh=fresh,
            tags=driver.run_tags(STAGE, seed=config.seed, output=folder.uri),
            data={"train": (digest, str(config.data.train))},
        )
        task = _task(config, plan, folder, run_id)
        saved = partial(saved_steps, folder.uri, task.channel, plan.size.total_steps)
        with ended_in_mlflow(config.tracking.uri, run_id, folder, what_is_saved=saved) as stopper:
            folder.forget_failure()
            failure = _train(config, plan, task, stopper)
            result = _finish(config, plan, folder, run_id, earlier=done)
            if config.data.val is not None:
                tell_evaluation(config.tracking.uri, run_id, failure)
    if failure is not None:
        logger.error(
            "the training is done and kept in %s; its evaluation failed: the same command "
            "evaluates anew without training again",
            result.output,
        )
        folder.record_failure(failure)
        folder.raise_failure()
        raise failure
    return result


def evaluation_key(config: PretrainConfig) -> str:
    """Name all that the evaluation is computed from, besides the trained model; "" without one."""
    if config.data.val is None:
        return ""
    facts = [
        config.knn.model_dump(mode="json"),
        fingerprint(config.data.train),  # Its names of classes count here, and not in training.
        fingerprint(config.data.val),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _inputs(config: PretrainConfig) -> dict[str, str]:
    """Fingerprints of all that training reads."""
    inputs = {"data.train": fingerprint(config.data.train, with_names=False)}
    if config.init_from is not None:
        inputs["init_from"] = fingerprint(config.init_from)
    return inputs


def _kept_result(done: StageResult, evaluation: dict[str, float] | None) -> StageResult | None:
    """The earlier result with the metrics of the evaluation asked for; None without these."""
    if evaluation is None:
        return None
    trained = {name: x for name, x in done.metrics.items() if not name.startswith(METRICS_PREFIX)}
    return done._replace(status="reused", metrics=evaluation | trained)


def _task(config: PretrainConfig, plan: Plan, folder: RunFolder, run_id: str | None) -> TrainTask:
    assert folder.start is not None
    return TrainTask(
        raw_config=config.model_dump(mode="json"),
        run_uri=folder.uri,
        init_uri=None if config.init_from is None else storage.absolute(config.init_from),
        start=folder.start,
        run_id=run_id,
        size=plan.size,
        data_digest=plan.manifest.digest,
        mean=plan.stats.mean,
        std=plan.stats.std,
        pictures=_pictures(config, plan.manifest),
        train_shards=plan.manifest.shards,
        val_shards=plan.val_shards,
        class_numbers=plan.classes.numbers,
        evaluation_key=evaluation_key(config),
    )


def _paths(config: PretrainConfig) -> Iterator[tuple[str, str]]:
    """Each path of the config, and the key that it is given by."""
    for key, uris in (("data.train", config.data.train), ("data.val", config.data.val or ())):
        for uri in [uris] if isinstance(uris, str) else uris:
            yield key, uri
    yield "storage.root", config.storage.root
    if config.init_from is not None:
        yield "init_from", config.init_from


def _check_init_from(config: PretrainConfig) -> None:
    """The weights to start from are there and fit; workers would find out one after the other."""
    uri = config.init_from
    if uri is None:
        return
    found = fetch_manifest(uri).model
    for name in ("encoder", "patch_size", "in_chans", "decoder"):  # positions follow img_size
        theirs, ours = getattr(found, name), getattr(config.model, name)
        if theirs != ours:
            raise ConfigError(
                f"init_from={uri}: was trained with model.{name}={theirs}, this run has {ours}"
            )


def _open_data(config: PretrainConfig, folder: RunFolder) -> OpenedData:
    """Open both sets before all else: an earlier result counts only for the data that it is of."""

    def opened(spec: str | tuple[str, ...], name: str) -> Manifest:
        uri = storage.join(folder.index_uri, name)
        return open_shards(spec, uri, max_bad_ratio=config.data.max_bad_ratio)

    val = None if config.data.val is None else opened(config.data.val, "val")
    return OpenedData(opened(config.data.train, "train"), val)


def _plan(config: PretrainConfig, data: OpenedData) -> Plan:
    manifest = data.train
    optim = config.optim
    total_steps = int(optim.epochs * manifest.num_samples / optim.global_batch_size + 1e-9)
    total_steps = min(total_steps, optim.max_steps or total_steps)
    if total_steps == 0:
        raise ConfigError(
            f"optim.epochs={optim.epochs:g} of {manifest.num_samples} samples is less than one "
            f"optim.global_batch_size={optim.global_batch_size}; lower it, or train longer"
        )
    stats = _channel_stats(config, manifest)
    logger.info(
        "data: %d samples in %d shards, digest=%s mean=%s std=%s",
        manifest.num_samples,
        len(manifest.shards),
        manifest.digest[:12],
        np.round(stats.mean, 3).tolist(),
        np.round(stats.std, 3).tolist(),
    )
    logger.info(
        "plan: %d steps of global batch %d = micro batch %d x %d workers x %d accumulated, "
        "learning rate %.2e",
        total_steps,
        optim.global_batch_size,
        optim.micro_batch_size,
        config.scaling.num_workers,
        config.grad_accum_steps,
        optim.learning_rate,
    )
    size = RunSize(
        total_steps, optim.global_batch_size, manifest.num_samples, config.data.crops_per_image
    )
    val_shards = () if data.val is None else data.val.shards
    return Plan(manifest, val_shards, _classes(data), stats, size)


def _classes(data: OpenedData) -> Classes:
    """What the numbers in both sets mean; a mistake in the labels is told before training.

    Raises:
        DataError: none of the samples that are looked at has a label.
    """
    if data.val is None:
        return Classes((), {})
    train = read_class_names(data.train.shards)
    both = train | read_class_names(data.val.shards)
    warn_of_unnamed(both)
    classes = classes_by_name(both)  # One that only data.val names has a number: it is wrong.
    for key, manifest in (("data.train", data.train), ("data.val", data.val)):
        check_labels(key, manifest.shards, classes.numbers)
    unknown = set(classes.names) - set(united_names(train))
    if any(train.values()) and unknown:
        logger.warning(
            "data.val names classes that data.train does not: %s; the kNN evaluation counts their "
            "images as wrong",
            ", ".join(sorted(unknown)),
        )
    return classes


def _channel_stats(config: PretrainConfig, manifest: Manifest) -> ChannelStats:
    in_chans = config.model.in_chans
    if config.data.stats == "imagenet":
        stats = IMAGENET_STATS
    else:
        stored = manifest.channel_stats
        fits = stored is not None and len(stored.mean) == in_chans
        stats = stored if stored and fits else measure_channel_stats(manifest, in_chans)
    if len(stats.mean) != in_chans:
        raise ConfigError(
            f"model.in_chans={in_chans}, but the channel statistics (data.stats="
            f"{config.data.stats}) have {len(stats.mean)} channels"
        )
    return stats


def _pictures(config: PretrainConfig, manifest: Manifest) -> Pictures:
    """The images and masks of the reconstruction picture: the same ones all through the run."""
    model = config.model
    pixels: list[Pixels] = []
    for shard in manifest.shards:
        for sample in read_rows(shard, 0, min(shard.num_samples, 4 * NUM_PICTURES)):
            try:
                pixels.append(
                    center_crop(decode_image(sample.image, model.in_chans), model.img_size)
                )
            except CorruptSampleError:
                continue
            if len(pixels) == NUM_PICTURES:
                break
        if len(pixels) == NUM_PICTURES:
            break
    noise = [
        draw_noise(
            named_generator(config.seed, "picture", i),
            model.grid_size,
            kind=config.masking.kind,
            mask_ratio=config.masking.mask_ratio,
        )
        for i in range(len(pixels))
    ]
    if not pixels:
        raise DataError(f"none of the first images of {manifest.shards[0].path} can be decoded")
    return Pictures(stack_pixels(pixels), np.stack(noise))


def _train(
    config: PretrainConfig, plan: Plan, task: TrainTask, stopper: driver.Stopper
) -> Exception | None:
    """Train and evaluate.

    Returns:
        Why the evaluation failed, if it did: what was trained is there all the same.
    """
    work = partial(
        fit,
        train_worker,
        task,
        run_uri=task.run_uri,
        scaling=config.scaling,
        read=partial(remaining_data, task),
    )
    try:
        run_until_stopped(stopper, work, task.channel, config.checkpoint)
    except Exception as error:
        task.folder.check_start()
        # A step beyond the last one is none of this run's: then nothing was evaluated.
        if plan.size.total_steps not in list_steps(task.run_uri):
            raise
        return error
    return None


def _finish(
    config: PretrainConfig,
    plan: Plan,
    folder: RunFolder,
    run_id: str | None,
    earlier: StageResult | None,
) -> StageResult:
    """Record the last checkpoint and its evaluation; then the run is done.

    Args:
        config: of the run.
        plan: of the run.
        folder: of the run.
        run_id: MLflow's.
        earlier: the result of a start that trained the model already; it has the encoder logged.
    """
    uri = config.tracking.uri
    with tempfile.TemporaryDirectory() as workspace:
        found = find_checkpoint(folder.uri, Path(workspace))
        if found is None or found.manifest.step != plan.size.total_steps:
            raise storage.StorageError(f"{folder.uri}: the last checkpoint is not there")
        metrics = dict(folder.read_evaluation(evaluation_key(config)) or {})
        metrics["data/left_out"] = len(log_bad_samples(uri, run_id, folder))
        tracking.log_final_metrics(uri, run_id, metrics, plan.size.total_steps)
        if earlier is None or earlier.run_id != run_id:
            log_encoder(uri, run_id, found.folder)
            tracking.log_artifact_file(uri, run_id, found.folder / "manifest.json", "checkpoint")
    logger.info("reconstruction picture: %s", folder.picture_uri)
    say_where_to_compare(uri)
    result = StageResult(
        STAGE, "done" if earlier is None else "evaluated", run_id, found.uri, metrics
    )
    folder.write_result(result)
    return result

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

import logging
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import ray.data
import ray.train
from ray.train.torch import TorchTrainer

from infra import storage, tracking
from mae_core.data.decode import decode_image
from mae_core.data.pixels import CorruptSampleError, Pixels
from mae_core.data.manifest import IMAGENET_STATS, ChannelStats, Manifest, ShardInfo
from mae_core.data.randomness import named_generator
from mae_core.data.samples import DataError
from mae_core.data.transforms import center_crop, stack_pixels
from mae_core.masking import draw_noise
from pipelines import driver, launch
from pipelines.checkpoints import fetch_manifest, find_checkpoint
from pipelines.config import ConfigError, PretrainConfig, StageResult
from pipelines.datasets import (
    measure_channel_stats,
    open_shards,
    read_rows,
)
from pipelines.export import log_encoder
from pipelines.knn import needed_label
from pipelines.recording import (
    earlier_record,
    ended_in_mlflow,
    log_bad_samples,
    say_where_to_compare,
    take_over,
)
from pipelines.reporting import RunSize
from pipelines.run_folder import RunFolder
from pipelines.train_worker import Pictures, TrainTask, remaining_data, train_worker

logger = logging.getLogger(__name__)

STAGE = "pretrain"
NUM_PICTURES = 8


class Plan(NamedTuple):
    """What the run will do, known before anything is started."""

    manifest: Manifest
    val_shards: tuple[ShardInfo, ...]
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
    folder = RunFolder(storage.join(storage.absolute(config.storage.root), STAGE, config.run_name))
    if fresh:
        storage.delete_folder(folder.index_uri)
    elif (done := folder.read_result()) is not None:
        logger.info("%s is done: not trained again (--fresh starts over)", folder.uri)
        return done._replace(status="reused")
    _check_init_from(config)
    plan = _plan(config, folder)
    digest = plan.manifest.digest
    earlier = None if fresh else earlier_record(folder, digest)
    with launch.running_ray(config.scaling):
        folder, run_id = take_over(
            config,
            folder,
            digest=digest,
            earlier=earlier,
            fresh=fresh,
            tags=driver.run_tags(STAGE, seed=config.seed, output=folder.uri),
            data={"train": (digest, str(config.data.train))},
        )
        with ended_in_mlflow(config.tracking.uri, run_id, folder):
            folder.forget_failure()
            _train(config, _task(config, plan, folder, run_id))
            return _finish(config, plan, folder, run_id)


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


def _plan(config: PretrainConfig, folder: RunFolder) -> Plan:
    manifest = open_shards(
        config.data.train,
        storage.join(folder.index_uri, "train"),
        max_bad_ratio=config.data.max_bad_ratio,
    )
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
    return Plan(
        manifest,
        _val_shards(config, folder, manifest.shards),
        stats,
        RunSize(
            total_steps,
            optim.global_batch_size,
            manifest.num_samples,
            config.data.crops_per_image,
        ),
    )


def _val_shards(
    config: PretrainConfig, folder: RunFolder, train: tuple[ShardInfo, ...]
) -> tuple[ShardInfo, ...]:
    """Opened before training, so that a mistake in data.val is not found after it."""
    if config.data.val is None:
        return ()
    val = open_shards(
        config.data.val,
        storage.join(folder.index_uri, "val"),
        max_bad_ratio=config.data.max_bad_ratio,
    ).shards
    for shard in (train[0], val[0]):
        for sample in read_rows(shard, 0, 1):
            needed_label(shard, sample)
    return val


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


def _train(config: PretrainConfig, task: TrainTask) -> None:
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"task": task},
        scaling_config=launch.ray_scaling(config.scaling),
        run_config=launch.ray_run(task.run_uri, config.scaling),
        # Called before each start of the workers, so a recovery reads from its own position on.
        datasets={"train": partial(remaining_data, task)},
        dataset_config=ray.train.DataConfig(enable_shard_locality=False),
    )
    trainer.fit()


def _finish(
    config: PretrainConfig, plan: Plan, folder: RunFolder, run_id: str | None
) -> StageResult:
    """Evaluate and record the last checkpoint; then the run is done."""
    uri = config.tracking.uri
    with tempfile.TemporaryDirectory() as workspace:
        found = find_checkpoint(folder.uri, Path(workspace))
        if found is None or found.manifest.step != plan.size.total_steps:
            raise storage.StorageError(f"{folder.uri}: the last checkpoint is not there")
        metrics = folder.read_evaluation()
        metrics["data/left_out"] = len(log_bad_samples(uri, run_id, folder))
        tracking.log_final_metrics(uri, run_id, metrics, plan.size.total_steps)
        log_encoder(uri, run_id, found.folder)
        tracking.log_artifact_file(uri, run_id, found.folder / "manifest.json", "checkpoint")
    logger.info("reconstruction picture: %s", folder.picture_uri)
    say_where_to_compare(uri)
    result = StageResult(STAGE, "done", run_id, found.uri, metrics)
    folder.write_result(result)
    return result

"""Plan a pretraining run that has work to do, start its workers, and write its result."""

import logging
from functools import partial
from typing import Literal, NamedTuple

import numpy as np

from infra import storage, tracking
from infra.scratch import scratch_folder
from mae_core.data.decode import decode_image
from mae_core.data.manifest import IMAGENET_STATS, ChannelStats, Manifest
from mae_core.data.pixels import CorruptSampleError, Pixels
from mae_core.data.randomness import named_generator
from mae_core.data.samples import DataError
from mae_core.data.transforms import center_crop, stack_pixels
from mae_core.masking import draw_noise
from pipelines.config.pretrain import HEALTH_PREFIX, PretrainConfig
from pipelines.config.steps import needed_steps
from pipelines.outcome import ConfigError, StageResult
from pipelines.reading.class_names import (
    Classes,
    classes_by_name,
    read_class_names,
    united_names,
    warn_of_unnamed,
)
from pipelines.reading.shards import measure_channel_stats, read_rows
from pipelines.training.checkpoints import (
    checkpoint_uri,
    fetch_checkpoint,
    find_checkpoint,
    list_steps,
)
from pipelines.training.export import log_encoder
from pipelines.training.fit import fit
from pipelines.training.flat_patches import measure_flat_patches
from pipelines.training.health_points import best_step
from pipelines.training.knn import check_labels, has_labels
from pipelines.training.pretrain_evaluation import evaluation_key
from pipelines.training.pretrain_task import Pictures, PretrainJob, remaining_data
from pipelines.training.protocol import Work
from pipelines.training.recording import log_bad_samples, saved_steps, tell_evaluation
from pipelines.training.reporting import RunSize
from pipelines.training.run_folder import RunFolder, Taken

logger = logging.getLogger(__name__)

STAGE = "pretrain"
NUM_PICTURES = 8


class OpenedData(NamedTuple):
    train: Manifest
    val: Manifest | None  # if None, nothing is measured on held-out images


class Plan(NamedTuple):
    """What the run will do; known before anything is started."""

    stats: ChannelStats
    has_labels: bool  # whether the held-out images have labels
    classes: Classes
    size: RunSize
    pictures: Pictures
    flat_patches: dict[str, float]  # their share, by the name of the metric


def plan_pretraining(
    config: PretrainConfig, train: Manifest, val: Manifest | None
) -> "PlannedPretraining":
    """Plan a run whose data are open; a mistake is reported before anything is written."""
    data = OpenedData(train, val)
    return PlannedPretraining(config, data, _plan(config, data))


class PlannedPretraining(NamedTuple):
    """See `pipelines.training.protocol.PlannedRun`."""

    config: PretrainConfig
    data: OpenedData
    plan: Plan

    def work(self, taken: Taken) -> Work:
        config, plan, data = self.config, self.plan, self.data
        tracking.log_final_metrics(config.tracking.uri, taken.run_id, plan.flat_patches, 0)
        job = PretrainJob(
            config=config,
            run_uri=taken.folder.uri,
            init_uri=None if config.init_from is None else storage.absolute(config.init_from),
            start=taken.start,
            run_id=taken.run_id,
            size=plan.size,
            data_digest=data.train.digest,
            mean=plan.stats.mean,
            std=plan.stats.std,
            pictures=plan.pictures,
            train_shards=data.train.shards,
            val_shards=() if data.val is None else data.val.shards,
            class_numbers=plan.classes.numbers,
            has_labels=plan.has_labels,
            evaluation_key=evaluation_key(config),
        )
        saved = partial(saved_steps, job.run_uri, job.channel, plan.size.total_steps)
        return Work(partial(fit, job, partial(remaining_data, job)), job.channel, saved)

    def is_kept(self, taken: Taken) -> bool:
        """Return whether the training is complete, so that only the evaluation can have failed."""
        # A checkpoint beyond the last step is not of this run; then nothing was evaluated.
        return self.plan.size.total_steps in list_steps(taken.folder.uri)

    def finish(
        self, taken: Taken, earlier: StageResult | None, failure: Exception | None
    ) -> StageResult:
        """Record the last checkpoint and its evaluation; then the run is done."""
        uri, run_id, folder = self.config.tracking.uri, taken.run_id, taken.folder
        total_steps = self.plan.size.total_steps
        with scratch_folder() as workspace:
            last = find_checkpoint(folder.uri)
            if last is None or last.step != total_steps:
                raise storage.StorageError(f"{folder.uri}: the last checkpoint is not there")
            found = fetch_checkpoint(checkpoint_uri(folder.uri, total_steps), workspace / "last")
            metrics = dict(folder.read_evaluation(evaluation_key(self.config)) or {})
            metrics |= _best(self.config, folder, run_id, total_steps)
            metrics["data/left_out"] = len(log_bad_samples(uri, run_id, folder))
            tracking.log_final_metrics(uri, run_id, metrics, total_steps)
            # An earlier start that completed the training has logged the model already.
            if earlier is None or earlier.run_id != run_id:
                log_encoder(uri, run_id, found.folder)
                tracking.log_artifact_file(
                    uri, run_id, found.folder / "manifest.json", "checkpoint"
                )
        logger.info("reconstruction picture: %s", folder.picture_uri)
        status: Literal["done", "evaluated"] = "done" if earlier is None else "evaluated"
        result = StageResult(STAGE, status, run_id, found.uri, metrics)
        folder.write_result(result)
        if evaluation_key(self.config):
            tell_evaluation(uri, run_id, failure)
        return result


def _best(
    config: PretrainConfig, folder: RunFolder, run_id: str | None, total_steps: int
) -> dict[str, float]:
    """Log which checkpoint is the best, if the run keeps it; return its step as a metric."""
    metric = config.checkpoint.keep_best
    if metric is None:
        return {}
    points = folder.read_health(evaluation_key(config))
    step = best_step(points, metric, total_steps)
    if step is None or step not in list_steps(folder.uri):
        logger.warning("the best checkpoint by %s is not there", metric)
        return {}
    uri, value = checkpoint_uri(folder.uri, step), points[step][metric.removeprefix(HEALTH_PREFIX)]
    logger.info("best checkpoint: %s=%.4f at step %d: %s", metric, value, step, uri)
    tracking.set_tags(config.tracking.uri, run_id, {"best_checkpoint": uri})
    return {"checkpoint/best_step": float(step)}


def _plan(config: PretrainConfig, data: OpenedData) -> Plan:
    optim, manifest = config.optim, data.train
    total_steps = needed_steps(optim, manifest.num_samples, "samples")
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
    flat_patches = measure_flat_patches(config, manifest, stats)
    labelled = _has_labels(config, data)
    classes = _classes(data) if labelled else Classes((), {})
    return Plan(stats, labelled, classes, size, _pictures(config, manifest), flat_patches)


def _has_labels(config: PretrainConfig, data: OpenedData) -> bool:
    """Return whether a kNN accuracy is measured; without any labels, only the health is.

    Raises:
        ConfigError: the best checkpoint is to be found by a kNN accuracy, and there are no labels.
    """
    if data.val is None:
        return False
    if config.health.every_epochs == 0 or has_labels(data.val.shards):
        return True
    if has_labels(data.train.shards):
        return True  # `check_labels` reports that the labels of data.val are missing
    if config.checkpoint.keep_best == "health/knn":
        raise ConfigError(
            "checkpoint.keep_best=health/knn needs labels (.cls), and data.train and data.val have "
            "none; use health/loss"
        )
    logger.info(
        "data.val has no labels: the loss and the features are measured on it, no kNN accuracy"
    )
    return False


def _classes(data: OpenedData) -> Classes:
    """Read the class names of both sets, and report a mistake in the labels before training.

    Raises:
        DataError: none of the samples that are looked at has a label.
    """
    if data.val is None:
        return Classes((), {})
    train = read_class_names(data.train.shards)
    both = train | read_class_names(data.val.shards)
    warn_of_unnamed(both)
    # A class that only data.val names gets a number too; its images count as wrong.
    classes = classes_by_name(both)
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
    """Choose the images and masks of the reconstruction picture, which stay the same in a run."""
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
            mask_ratio=config.masking.last_ratio,
            cell=config.masking.cell,
        )
        for i in range(len(pixels))
    ]
    if not pixels:
        raise DataError(f"none of the first images of {manifest.shards[0].path} can be decoded")
    return Pictures(stack_pixels(pixels), np.stack(noise))

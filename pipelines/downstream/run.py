"""The driver of classify, detect and segment: what is trained, with what, and what came of it."""

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from infra import storage, tracking
from mae_core.checkpoint import WEIGHTS_FILE, CheckpointManifest
from mae_core.data.decode import decode_image, jpeg_header
from mae_core.data.label_subset import stratified_subset
from mae_core.data.manifest import Manifest, ShardInfo
from mae_core.data.pixels import CorruptSampleError
from mae_core.data.samples import DataError, Sample
from mae_core.model.classifier import layer_scales
from mae_core.optim import fine_tuning_groups
from pipelines import driver
from pipelines.config.downstream import DownstreamConfig, TuningOptimConfig
from pipelines.downstream.job import TuningJob, remaining_data
from pipelines.downstream.task import Arm, Evaluation, Task, TaskInfo
from pipelines.downstream.worker import tuning_worker
from pipelines.outcome import ConfigError, StageResult
from pipelines.reading.class_names import Numbers
from pipelines.reading.fingerprints import fingerprint
from pipelines.reading.shards import (
    BrokenSample,
    Rows,
    open_shards,
    read_rows,
    read_samples,
    target_of,
)
from pipelines.training import launch
from pipelines.training.checkpoints import at_newest_checkpoint, fetch_manifest
from pipelines.training.recording import (
    earlier_record,
    ended_in_mlflow,
    log_bad_samples,
    run_until_stopped,
    saved_steps,
    say_where_to_compare,
    take_over,
)
from pipelines.training.run import fit
from pipelines.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

T = TypeVar("T")

ROWS_PER_READ = 512
MEASURING_TIMEOUT_S = 6 * 3600
READ_THREADS = 4
MAX_NAMED = 10
UNTRAINED = ("knn", "logistic")


class LabelledData(NamedTuple):
    train: Manifest
    val: Manifest

    def digest(self, encoder: CheckpointManifest) -> str:
        """Names all that went in."""
        weights = encoder.files[WEIGHTS_FILE].sha256[:16]
        return f"{self.train.digest[:16]}-{self.val.digest[:16]}-{weights}"


class Study(NamedTuple):
    """What all labels of both sets say, before anything is trained."""

    names: tuple[str, ...]  # of the classes
    strata: Sequence[Hashable]  # of each training sample: what shares of the labels spread evenly
    numbers: Numbers = MappingProxyType({})


class Stage(NamedTuple):
    """What a stage adds."""

    targets: tuple[str, ...]  # extensions that hold the label, the first that is there
    study: Callable[[DownstreamConfig, LabelledData, CheckpointManifest], Study]
    make_task: Callable[[DownstreamConfig, TaskInfo], Task]
    # All arms' metrics to pictures and tables of the whole run.
    summarize: Callable[[DownstreamConfig, TaskInfo, dict[Arm, dict[str, float]]], Evaluation]


def run(config: DownstreamConfig, stage: Stage, *, fresh: bool) -> StageResult:
    """Train and measure each arm, or go on with it, or find that it is done.

    Raises:
        ConfigError, DataError, NoShardsError, StorageError: before any worker is started, unless
            only reading can tell.
    """
    driver.check_paths(_paths(config))
    driver.check_tracking(config.tracking.uri)
    config = at_newest_checkpoint(config)
    root = storage.absolute(config.storage.root)
    folder = RunFolder(storage.join(root, config.stage, config.run_name))
    pretrained = fetch_manifest(config.init_from)
    encoder = _at_run_size(config, pretrained)
    if fresh:
        storage.delete_folder(folder.index_uri)
    data = _open_data(config, folder)
    digest = data.digest(encoder)
    inputs = {
        "data.train": fingerprint(config.data.train),
        "data.val": fingerprint(config.data.val),
        "init_from": fingerprint(config.init_from),
    }
    earlier = None if fresh else earlier_record(folder, digest, inputs)
    if not fresh and (done := folder.read_whole_result()) is not None:
        logger.info("%s is done: not trained again (--fresh starts over)", folder.uri)
        return done._replace(status="reused")
    _check_first_sample(config, encoder, data, stage)
    study = stage.study(config, data, encoder)
    if len(set(study.names)) < len(study.names):
        raise ConfigError(f"two classes have the same name: {', '.join(sorted(study.names))}")
    title = f"{config.run_name} on {_short(config.data.val)}"
    info = TaskInfo(encoder.model, study.names, title, study.numbers)
    chosen = _plan_arms(config, data.train, study.strata)
    with launch.running_ray(config.scaling):
        taken = take_over(
            config,
            folder,
            digest=digest,
            inputs=inputs,
            earlier=earlier,
            fresh=fresh,
            tags=_tags(config, encoder, folder),
            data={
                "train": (data.train.digest, str(config.data.train)),
                "val": (data.val.digest, str(config.data.val)),
            },
        )
        job = TuningJob(
            config_type=type(config),
            raw_config=config.model_dump(mode="json"),
            make_task=partial(stage.make_task, config, info),
            targets=stage.targets,
            classes=study.names,
            init_uri=storage.absolute(config.init_from),
            run_uri=folder.uri,
            start=taken.start,
            run_id=taken.run_id,
            arms=tuple(arm for arm, _ in chosen),
            rows=tuple(rows for _, rows in chosen),
            train_shards=data.train.shards,
            val_shards=data.val.shards,
            data_digest=digest,
            encoder=encoder,
            pretrained=pretrained.model,
        )
        saved = partial(saved_steps, folder.uri, job.channel, job.total_steps)
        folder, run_id = taken
        with ended_in_mlflow(config.tracking.uri, run_id, folder, what_is_saved=saved) as stopper:
            folder.forget_failure()
            _train(config, job, stopper)
            return _finish(config, stage, info, job, folder)


def _tags(
    config: DownstreamConfig, encoder: CheckpointManifest, folder: RunFolder
) -> dict[str, str]:
    seeds = ",".join(map(str, config.arms_config.seeds))
    return {
        **driver.run_tags(config.stage, seed=seeds, output=folder.uri),
        "init_from": storage.absolute(config.init_from),
        "pretrained.data_digest": encoder.data_digest,
        "pretrained.step": str(encoder.step),
    }


def _short(spec: str | tuple[str, ...]) -> str:
    """The end of a path, for titles."""
    text = spec if isinstance(spec, str) else spec[0]
    return "/".join(text.rstrip("/").split("/")[-2:])


def _paths(config: DownstreamConfig) -> Iterator[tuple[str, str]]:
    for key, uris in (("data.train", config.data.train), ("data.val", config.data.val)):
        for uri in [uris] if isinstance(uris, str) else uris:
            yield key, uri
    yield "storage.root", config.storage.root
    yield "init_from", config.init_from


def _at_run_size(config: DownstreamConfig, found: CheckpointManifest) -> CheckpointManifest:
    """The checkpoint's manifest, for images of this run's size."""
    height, width = size = config.img_size or found.model.img_size
    patch = found.model.patch_size
    if height < patch or width < patch or height % patch or width % patch:
        raise ConfigError(
            f"img_size={height}x{width} is not a multiple of {patch}, the patch_size of "
            f"init_from={config.init_from}"
        )
    return found.model_copy(update={"model": found.model.model_copy(update={"img_size": size})})


def _open_data(config: DownstreamConfig, folder: RunFolder) -> LabelledData:
    def opened(spec: str | tuple[str, ...], name: str) -> Manifest:
        uri = storage.join(folder.index_uri, name)
        return open_shards(spec, uri, max_bad_ratio=config.data.max_bad_ratio)

    return LabelledData(opened(config.data.train, "train"), opened(config.data.val, "val"))


def _check_first_sample(
    config: DownstreamConfig, encoder: CheckpointManifest, data: LabelledData, stage: Stage
) -> None:
    """What is wrong with every sample is told before anything is started."""
    for key, manifest in (("data.train", data.train), ("data.val", data.val)):
        shard = manifest.shards[0]
        for sample in read_rows(shard, 0, 1):
            if target_of(sample, stage.targets) is None:
                wanted = " or ".join(f".{name}" for name in stage.targets)
                raise DataError(f"{key}: {shard.path}: {sample.key} has no {wanted}")
            try:
                decode_image(sample.image, encoder.model.in_chans)
            except CorruptSampleError as error:
                if error.kind == "channels":
                    raise ConfigError(
                        f"init_from={config.init_from}: takes in_chans={encoder.model.in_chans} in "
                        f"patches of {encoder.model.patch_size}, but {key}: {shard.path}: "
                        f"{sample.key} {error}"
                    ) from error


class Target(NamedTuple):
    shard: str
    where: str  # shard and key, for errors
    data: bytes | None  # of the label
    is_broken: bool  # the sample can't be read: a hole in training


def read_targets(manifest: Manifest, extensions: tuple[str, ...]) -> list[Target]:
    """The label of each sample; of all shards, in order."""
    return list(map_samples(manifest, lambda shard, row: _target(shard, row, extensions)))


def _target(shard: str, row: Sample | BrokenSample, extensions: tuple[str, ...]) -> Target:
    data = target_of(row, extensions)
    return Target(shard, f"{shard}: {row.key}", data, isinstance(row, BrokenSample))


def map_samples(
    manifest: Manifest, function: Callable[[str, Sample | BrokenSample], T]
) -> Iterator[T]:
    """Give each sample with the path of its shard to `function`, in threads; results in order."""
    pieces = [
        (shard, start, min(start + ROWS_PER_READ, shard.num_samples))
        for shard in manifest.shards
        for start in range(0, shard.num_samples, ROWS_PER_READ)
    ]

    def read(piece: tuple[ShardInfo, int, int]) -> list[T]:
        shard, start, stop = piece
        return [function(shard.path, row) for row in read_samples(shard, start, stop)]

    with ThreadPoolExecutor(READ_THREADS) as pool:
        for first in range(0, len(pieces), READ_THREADS):  # not all at once: images are large
            for results in pool.map(read, pieces[first : first + READ_THREADS]):
                yield from results


def picture_shape(row: Sample | BrokenSample, in_chans: int) -> tuple[int, ...] | None:
    """Height and width of a sample's upright image; None where it can't be decoded."""
    if isinstance(row, BrokenSample):
        return None
    header = jpeg_header(row.image)
    if header is not None and header.orientation == 1:
        return header.height, header.width
    try:
        return decode_image(row.image, in_chans).shape[:2]
    except CorruptSampleError:
        return None


def warn_of_absent(key: str, names: Sequence[str], counts: Mapping[int, int]) -> None:
    """Name the classes that no training sample has, before anything is trained.

    Args:
        key: of the config that names the classes.
        names: of all classes.
        counts: training samples by the number of the class.
    """
    absent = [name for number, name in enumerate(names) if not counts.get(number)]
    if absent:
        logger.warning(
            "%s: no sample of data.train has the class %s: the model cannot learn it, and its "
            "scores will be 0 or missing",
            key,
            ", ".join(absent[:MAX_NAMED]) + (", ..." if len(absent) > MAX_NAMED else ""),
        )


def _plan_arms(
    config: DownstreamConfig, train: Manifest, strata: Sequence[Hashable]
) -> list[tuple[Arm, tuple[Rows, ...]]]:
    section, optim = config.arms_config, config.optim
    planned: list[tuple[Arm, tuple[Rows, ...]]] = []
    step = 0
    for fraction in sorted(section.label_fraction):
        for seed in section.seeds:
            rows = _rows(train, strata, fraction, seed)
            num_samples = sum(map(len, rows))
            for name in config.arms:
                if name in UNTRAINED and fraction == 1 and seed != section.seeds[0]:
                    continue  # nothing in it depends on the seed
                steps = 0 if name in UNTRAINED else _num_steps(config, num_samples)
                planned.append((Arm(name, fraction, seed, num_samples, steps, step), rows))
                step += steps
    logger.info(
        "plan: %d arms, %d steps in all of global batch %d = micro batch %d x %d workers x %d",
        len(planned),
        step,
        optim.global_batch_size,
        optim.micro_batch_size,
        config.scaling.num_workers,
        optim.global_batch_size // (optim.micro_batch_size * config.scaling.num_workers),
    )
    return planned


def _num_steps(config: DownstreamConfig, num_samples: int) -> int:
    optim = config.optim
    steps = int(optim.epochs * num_samples / optim.global_batch_size + 1e-9)
    if steps == 0:
        raise ConfigError(
            f"optim.epochs={optim.epochs:g} of {num_samples} labelled samples is less than one "
            f"optim.global_batch_size={optim.global_batch_size}; lower it, or train longer"
        )
    return min(steps, optim.max_steps or steps)


def _rows(
    train: Manifest, strata: Sequence[Hashable], fraction: float, seed: int
) -> tuple[Rows, ...]:
    counts = [shard.num_samples for shard in train.shards]
    if fraction == 1:
        return tuple(range(count) for count in counts)
    chosen = stratified_subset(strata, fraction, seed)
    ends = np.cumsum(counts)
    return tuple(
        chosen[(chosen >= end - count) & (chosen < end)] - (end - count)
        for count, end in zip(counts, ends, strict=True)
    )


def _train(config: DownstreamConfig, job: TuningJob, stopper: driver.Stopper) -> None:
    work = partial(
        fit,
        tuning_worker,
        job,
        run_uri=job.run_uri,
        scaling=config.scaling,
        read=partial(remaining_data, job) if job.is_trained else None,
        # The others wait while the first worker measures an arm.
        timeout_s=MEASURING_TIMEOUT_S,
    )
    run_until_stopped(stopper, work, job.channel, config.checkpoint)


def _finish(
    config: DownstreamConfig, stage: Stage, info: TaskInfo, job: TuningJob, folder: RunFolder
) -> StageResult:
    """Bring the arms' results together; then the run is done."""
    uri, run_id = config.tracking.uri, job.run_id
    found = {arm: folder.read_arm(arm.label) for arm in job.arms if folder.has_arm(arm.label)}
    missing = {a.label: folder.read_arm_failure(a.label) for a in job.arms if a not in found}
    if lost := [label for label, why in missing.items() if why is None]:
        raise storage.StorageError(f"{folder.uri}: no result of {', '.join(lost)} is there")
    metrics = mean_metrics(found)
    metrics["data/left_out"] = len(log_bad_samples(uri, run_id, folder))
    tracking.log_final_metrics(uri, run_id, metrics, max(arm.steps for arm in job.arms))
    for arm in found:
        for name, content in folder.read_arm_files(arm.label).items():
            tracking.log_artifact_bytes(uri, run_id, content, f"{arm.label}/{name}")
    summary = stage.summarize(config, info, found)
    for name, text in summary.texts.items():
        folder.write_file(name, text.encode())
        tracking.log_artifact_text(uri, run_id, text, name)
        logger.info("\n%s", text.rstrip())
    for name, picture in summary.pictures.items():
        logger.info("%s: %s", name, folder.write_picture_file(name, picture))
        tracking.log_picture(uri, run_id, picture, name, 0)
    if missing:
        raise DataError(
            f"{len(missing)} of {len(job.arms)} arms could not be measured; the others are "
            f"recorded in {folder.uri}, and the same command measures only these again: "
            + "; ".join(f"{label}: {why}" for label, why in missing.items())
        )
    kept = _kept_arm(job.arms)
    output = folder.uri if kept is None else folder.model_uri(kept.label)
    say_where_to_compare(uri)
    result = StageResult(config.stage, "done", run_id, output, metrics)
    folder.write_result(result)
    return result


def _kept_arm(arms: Sequence[Arm]) -> Arm | None:
    """Whose model is the run's output: fine-tuned if one is, with the most labels."""
    trained = [arm for arm in arms if arm.steps]
    preferred = ("finetune", "frozen", "linear", "scratch")
    first = min((preferred.index(arm.name) for arm in trained), default=None)
    if first is None:
        return None
    return max((a for a in trained if a.name == preferred[first]), key=lambda arm: arm.fraction)


def mean_metrics(found: dict[Arm, dict[str, float]]) -> dict[str, float]:
    """`arm/metric`, or `arm-fraction/metric` where there are several: the mean over the seeds.

    With `_std` of several seeds' standard deviation (n - 1).
    """
    several = len({arm.fraction for arm in found}) > 1
    values: dict[str, list[float]] = {}
    for arm, metrics in found.items():
        name = f"{arm.name}-{arm.fraction:g}" if several else arm.name
        for metric, value in metrics.items():
            values.setdefault(f"{name}/{metric}", []).append(value)
    means = {key: float(np.mean(seeds)) for key, seeds in values.items()}
    spreads = {
        f"{key}_std": float(np.std(seeds, ddof=1))
        for key, seeds in values.items()
        if len(seeds) > 1
    }
    return means | spreads


def adamw(model: nn.Module, optim: TuningOptimConfig, arm: Arm) -> torch.optim.AdamW:
    """AdamW over what is trainable; a pretrained encoder's lower layers learn more slowly."""
    scales = {name: 1.0 for name, _ in model.named_parameters()}
    if arm.name == "finetune":
        scales = layer_scales(model, optim.layer_decay)
    groups = fine_tuning_groups(model, optim.weight_decay, scales)
    return torch.optim.AdamW(groups, lr=optim.learning_rate, betas=optim.betas, fused=True)


def arms_table(found: dict[Arm, dict[str, float]]) -> str:
    """A row for each arm and share of the labels: mean and standard deviation over the seeds."""
    metrics = list(dict.fromkeys(metric for values in found.values() for metric in values))
    grouped: dict[tuple[str, float], list[dict[str, float]]] = {}
    for arm, values in found.items():
        grouped.setdefault((arm.name, arm.fraction), []).append(values)
    lines = [f"| arm | labels | {' | '.join(metrics)} |", "|---|---|" + "---|" * len(metrics)]
    for (name, fraction), seeds in grouped.items():
        cells = [_mean_and_spread([s[m] for s in seeds if m in s]) for m in metrics]
        lines.append(f"| {name} | {100 * fraction:g} % | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _mean_and_spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.3f}"

"""Drive a run of classify, detect or segment: plan its arms, and collect their results."""

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import nn

from infra import storage, tracking
from infra.shard_spec import as_entries
from mae_core.checkpoint_manifest import WEIGHTS_FILE, CheckpointManifest
from mae_core.data.decode import decode_image
from mae_core.data.manifest import Manifest
from mae_core.data.pixels import CorruptSampleError
from mae_core.data.samples import DataError
from mae_core.model.classifier import layer_scales
from mae_core.optim import fine_tuning_groups, with_head_scale
from pipelines import driver
from pipelines.config.arms import ArmKind
from pipelines.config.downstream import DownstreamConfig, TuningOptimConfig
from pipelines.downstream.arms import Arm, kept_arm, mean_metrics, plan_arms
from pipelines.downstream.task import (
    Evaluation,
    PredictionT,
    Task,
    TaskInfo,
    TruthT,
    WantedT,
)
from pipelines.downstream.trials import rates_table
from pipelines.downstream.tuning import TuningJob, remaining_data
from pipelines.downstream.verdict import Verdict, judge, verdict_picture
from pipelines.outcome import ConfigError, StageResult
from pipelines.reading.class_names import Numbers
from pipelines.reading.fingerprints import fingerprint
from pipelines.reading.shards import Rows, open_shards, read_rows, target_of
from pipelines.training.checkpoints import fetch_manifest
from pipelines.training.fit import fit
from pipelines.training.init_from import lineage_tags
from pipelines.training.protocol import Identity, Work
from pipelines.training.recording import log_bad_samples, saved_steps
from pipelines.training.run import checked, drive
from pipelines.training.run_folder import RunFolder, Taken

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT", bound=DownstreamConfig)

MEASURING_TIMEOUT_S = 6 * 3600
VERDICT_FILE = "verdict.md"


class LabelledData(NamedTuple):
    train: Manifest
    val: Manifest

    def digest(self, encoder: CheckpointManifest) -> str:
        """Return a name for everything that a run is computed from."""
        weights = encoder.files[WEIGHTS_FILE].sha256[:16]
        return f"{self.train.digest[:16]}-{self.val.digest[:16]}-{weights}"


class Study(NamedTuple):
    """What the labels of both sets say; known before anything is trained."""

    names: tuple[str, ...]  # of the classes
    # Stratum of each training sample; a share of the labels is spread evenly over the strata.
    strata: Sequence[Hashable]
    numbers: Numbers = MappingProxyType({})
    identifiers: tuple[int, ...] = ()  # category_id of each class, if labels have one
    ceiling: Mapping[str, float] = MappingProxyType({})  # scores that a perfect model could reach


@dataclass(frozen=True)
class TaskKind(Generic[ConfigT, WantedT, TruthT, PredictionT]):
    """What a stage adds to the driver."""

    # Extensions of the files that hold the label; the first one that exists is used.
    targets: tuple[str, ...]
    study: Callable[[ConfigT, LabelledData, CheckpointManifest], Study]
    make_task: Callable[[ConfigT, TaskInfo], Task[WantedT, TruthT, PredictionT]]
    # Turns the metrics of all arms into pictures and tables of the run.
    summarize: Callable[[ConfigT, TaskInfo, dict[Arm, dict[str, float]]], Evaluation]


def run(
    config: ConfigT, kind: TaskKind[ConfigT, WantedT, TruthT, PredictionT], *, fresh: bool
) -> StageResult:
    """Train and measure each arm, or resume, or reuse the result; see `training.run.drive`."""
    given = {
        "data.train": config.data.train,
        "data.val": config.data.val,
        "storage.root": config.storage.root,
        "init_from": config.init_from,
    }
    return drive(TuningRun(checked(config, given), kind), fresh=fresh)


class TuningRun(Generic[ConfigT, WantedT, TruthT, PredictionT]):
    """See `pipelines.training.protocol.Run`."""

    needs_ray = True

    def __init__(
        self, config: ConfigT, kind: TaskKind[ConfigT, WantedT, TruthT, PredictionT]
    ) -> None:
        self.config = config
        self.kind = kind
        self.stage = config.stage

    def open(self, folder: RunFolder) -> "OpenedTuning[ConfigT, WantedT, TruthT, PredictionT]":
        config = self.config
        pretrained = fetch_manifest(config.init_from)
        encoder = _at_run_size(config, pretrained)

        def opened(spec: str | tuple[str, ...], name: str) -> Manifest:
            uri = storage.join(folder.index_uri, name)
            return open_shards(spec, uri, max_bad_ratio=config.data.max_bad_ratio)

        data = LabelledData(opened(config.data.train, "train"), opened(config.data.val, "val"))
        return OpenedTuning(config, self.kind, folder, data, pretrained, encoder)


@dataclass(frozen=True)
class OpenedTuning(Generic[ConfigT, WantedT, TruthT, PredictionT]):
    """See `pipelines.training.protocol.OpenedRun`."""

    config: ConfigT
    kind: TaskKind[ConfigT, WantedT, TruthT, PredictionT]
    folder: RunFolder
    data: LabelledData
    pretrained: CheckpointManifest
    encoder: CheckpointManifest  # the same for images of this run's size

    @property
    def identity(self) -> Identity:
        config, data = self.config, self.data
        seeds = ",".join(map(str, config.section.seeds))
        return Identity(
            data.digest(self.encoder),
            inputs={
                "data.train": fingerprint(config.data.train),
                "data.val": fingerprint(config.data.val),
                "init_from": fingerprint(config.init_from),
                **self._split,
            },
            data={
                "train": (data.train.digest, str(config.data.train)),
                "val": (data.val.digest, str(config.data.val)),
            },
            tags={
                **driver.run_tags(config.stage, seed=seeds, output=self.folder.uri),
                **lineage_tags(config.init_from, self.pretrained),
            },
        )

    @property
    def _split(self) -> dict[str, str]:
        """The split of a batch, if the encoder's batch norms make the result depend on it."""
        if not self.encoder.model.has_batch_norm:
            return {}
        return {
            "optim.micro_batch_size": str(self.config.optim.micro_batch_size),
            "scaling.num_workers": str(self.config.scaling.num_workers),
        }

    def reuse(self, done: StageResult) -> StageResult | None:
        return done._replace(status="reused")

    def plan(self) -> "PlannedTuning[ConfigT, WantedT, TruthT, PredictionT]":
        config, kind, data = self.config, self.kind, self.data
        _check_first_sample(config, self.encoder, data, kind.targets)
        study = kind.study(config, data, self.encoder)
        if len(set(study.names)) < len(study.names):
            raise ConfigError(f"two classes have the same name: {', '.join(sorted(study.names))}")
        title = f"{config.run_name} on {_short(config.data.val)}"
        info = TaskInfo(
            self.encoder.model,
            study.names,
            title,
            study.numbers,
            study.identifiers,
            self.encoder.channel_mean,
            study.ceiling,
        )
        return PlannedTuning(self, info, plan_arms(config, data.train, study.strata))


@dataclass(frozen=True)
class PlannedTuning(Generic[ConfigT, WantedT, TruthT, PredictionT]):
    """See `pipelines.training.protocol.PlannedRun`."""

    opened: OpenedTuning[ConfigT, WantedT, TruthT, PredictionT]
    info: TaskInfo
    chosen: list[tuple[Arm, tuple[Rows, ...]]]

    @property
    def arms(self) -> tuple[Arm, ...]:
        return tuple(arm for arm, _ in self.chosen)

    def work(self, taken: Taken) -> Work:
        opened, config = self.opened, self.opened.config
        job = TuningJob(
            config=config,
            make_task=partial(opened.kind.make_task, config, self.info),
            targets=opened.kind.targets,
            classes=self.info.names,
            category_ids=self.info.identifiers,
            init_uri=storage.absolute(config.init_from),
            run_uri=taken.folder.uri,
            start=taken.start,
            run_id=taken.run_id,
            arms=self.arms,
            rows=tuple(rows for _, rows in self.chosen),
            train_shards=opened.data.train.shards,
            val_shards=opened.data.val.shards,
            data_digest=opened.data.digest(opened.encoder),
            encoder=opened.encoder,
            pretrained=opened.pretrained.model,
        )
        saved = partial(saved_steps, job.run_uri, job.channel, job.total_steps)
        read = partial(remaining_data, job) if job.is_trained else None
        # The other workers must wait while the first one measures an arm.
        return Work(partial(fit, job, read, MEASURING_TIMEOUT_S), job.channel, saved)

    def is_kept(self, taken: Taken) -> bool:
        """Return False, because an arm that can't be measured is recorded and stops no other."""
        return False

    def finish(
        self, taken: Taken, earlier: StageResult | None, failure: Exception | None
    ) -> StageResult:
        """Collect the arms' results and write the result of the run."""
        config, folder, run_id = self.opened.config, taken.folder, taken.run_id
        measured, missing = self._measured(folder)
        found = {arm: x for arm, x in measured.items() if not arm.is_trial}
        verdict = judge(found, config.section.metric, len(self.info.names))
        metrics = mean_metrics(found) | verdict.metrics | dict(self.info.ceiling)
        metrics["data/left_out"] = len(log_bad_samples(config.tracking.uri, run_id, folder))
        last_step = max(arm.steps for arm in self.arms)
        tracking.log_final_metrics(config.tracking.uri, run_id, metrics, last_step)
        rates = rates_table(self.arms, measured, verdict.metric)
        self._show(found, taken, verdict, rates)
        if missing:
            raise DataError(
                f"{len(missing)} of {len(self.arms)} arms could not be measured; the others are "
                f"recorded in {folder.uri}, and the same command measures only these again: "
                + "; ".join(f"{label}: {why}" for label, why in missing.items())
            )
        kept = kept_arm([arm for arm in self.arms if not arm.is_trial])
        output = folder.uri if kept is None else folder.model_uri(kept.label)
        result = StageResult(config.stage, "done", run_id, output, metrics)
        folder.write_result(result)
        return result

    def _measured(
        self, folder: RunFolder
    ) -> tuple[dict[Arm, dict[str, float]], dict[str, str | None]]:
        """Return the metrics of each arm that was measured, and why each other one was not."""
        found = {arm: folder.read_arm(arm.label) for arm in self.arms if folder.has_arm(arm.label)}
        missing = {a.label: folder.read_arm_failure(a.label) for a in self.arms if a not in found}
        if lost := [label for label, why in missing.items() if why is None]:
            raise storage.StorageError(f"{folder.uri}: no result of {', '.join(lost)} is there")
        return found, missing

    def _show(
        self, found: dict[Arm, dict[str, float]], taken: Taken, verdict: Verdict, rates: str
    ) -> None:
        """Write the arms' and the run's pictures and tables to MLflow and into the folder."""
        uri, (folder, run_id) = self.opened.config.tracking.uri, taken
        for arm in found:
            for name, content in folder.read_arm_files(arm.label).items():
                tracking.log_artifact_bytes(uri, run_id, content, f"{arm.label}/{name}")
        summary = self.opened.kind.summarize(self.opened.config, self.info, found)
        summary.texts["summary.md"] += rates + verdict.page
        summary.pictures["arms"] = verdict_picture(found, verdict, self.info.title)
        for name, text in summary.texts.items():
            folder.write_file(name, text.encode())
            tracking.log_artifact_text(uri, run_id, text, name)
            logger.info("\n%s", text.rstrip())
        for name, picture in summary.pictures.items():
            logger.info("%s: %s", name, folder.write_picture_file(name, picture))
            tracking.log_picture(uri, run_id, picture, name, 0)
        folder.write_file(VERDICT_FILE, verdict.page.encode())
        for text in verdict.texts:
            logger.info("%s", text)
        for text in verdict.warnings:
            logger.warning("%s", text)
        if verdict.page:
            tags = {"verdict": "; ".join(verdict.texts), "mlflow.note.content": verdict.page}
            tracking.set_tags(uri, run_id, tags)


def _short(spec: str | tuple[str, ...]) -> str:
    """Return the last parts of a path, for titles."""
    return "/".join(as_entries(spec)[0].rstrip("/").split("/")[-2:])


def _at_run_size(config: DownstreamConfig, found: CheckpointManifest) -> CheckpointManifest:
    """Return the checkpoint's manifest with this run's image size."""
    height, width = size = config.img_size or found.model.img_size
    patch = found.model.patch_size
    if height < patch or width < patch or height % patch or width % patch:
        raise ConfigError(
            f"img_size={height}x{width} is not a multiple of {patch}, the patch_size of "
            f"init_from={config.init_from}"
        )
    return found.model_copy(update={"model": found.model.model_copy(update={"img_size": size})})


def _check_first_sample(
    config: DownstreamConfig,
    encoder: CheckpointManifest,
    data: LabelledData,
    targets: tuple[str, ...],
) -> None:
    """Report, before anything is started, a mistake that concerns every sample."""
    for key, manifest in (("data.train", data.train), ("data.val", data.val)):
        shard = manifest.shards[0]
        for sample in read_rows(shard, 0, 1):
            if target_of(sample, targets) is None:
                wanted = " or ".join(f".{name}" for name in targets)
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


def adamw(model: nn.Module, optim: TuningOptimConfig, arm: Arm) -> torch.optim.AdamW:
    """Build AdamW for the trainable parameters; lower layers and the head have their own rates."""
    scales = {name: 1.0 for name, _ in model.named_parameters()}
    if arm.kind is ArmKind.FINETUNE:
        scales = layer_scales(model, optim.layer_decay)
    scales = with_head_scale(scales, optim.head_lr_scale)
    groups = fine_tuning_groups(model, optim.weight_decay, scales)
    return torch.optim.AdamW(groups, lr=optim.scaled(optim.rates[0]), betas=optim.betas, fused=True)

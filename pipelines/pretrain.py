#!/usr/bin/env python
"""Pretrain a masked autoencoder on image shards.

    python pipelines/pretrain.py configs/pretrain/demo.yaml optim.epochs=20
    ray job submit --working-dir . -- python pipelines/pretrain.py FILE.yaml data.train=s3://...

If it was stopped, the same command resumes; a finished run is not trained again.

What a run does is in `pipelines/training/run.py`; the step loop is `TrainingProcess._train` in
`pipelines/training/process.py`. What pretraining adds is here, in
`pipelines/training/pretrain_run.py` and in `pipelines/training/pretrain_task.py`.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: import the package, not the files beside this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from pipelines.cli import main

    sys.exit(main(["pretrain", *sys.argv[1:]]))

import logging
from typing import NamedTuple

from infra import storage
from infra.quick_imports import without_collecting
from mae_core.checkpoint_manifest import AUTHORS_FORMAT, CheckpointManifest
from mae_core.data.manifest import Manifest
from pipelines import driver
from pipelines.config.pretrain import PretrainConfig
from pipelines.outcome import ConfigError, StageResult
from pipelines.reading.fingerprints import fingerprint
from pipelines.reading.shards import open_shards
from pipelines.training.checkpoints import fetch_manifest
from pipelines.training.init_from import lineage_tags
from pipelines.training.pretrain_evaluation import MEASURED_PREFIXES, evaluation_key
from pipelines.training.protocol import Identity, PlannedRun
from pipelines.training.run import checked, drive
from pipelines.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

STAGE = "pretrain"


def run(config: PretrainConfig, *, fresh: bool) -> StageResult:
    """Pretrain, resume, or return the finished result; see `pipelines.training.run.drive`."""
    given = {
        "data.train": config.data.train,
        "data.val": config.data.val,
        "storage.root": config.storage.root,
        "init_from": config.init_from,
    }
    return drive(PretrainRun(checked(config, given)), fresh=fresh)


class PretrainRun:
    """See `pipelines.training.protocol.Run`."""

    stage = STAGE
    needs_ray = True

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config

    def open(self, folder: RunFolder) -> "OpenedPretraining":
        config = self.config
        pretrained = check_init_from(config)

        def opened(spec: str | tuple[str, ...], name: str) -> Manifest:
            uri = storage.join(folder.index_uri, name)
            return open_shards(spec, uri, max_bad_ratio=config.data.max_bad_ratio)

        val = None if config.data.val is None else opened(config.data.val, "val")
        train = opened(config.data.train, "train")
        return OpenedPretraining(config, folder, train, val, pretrained)


class OpenedPretraining(NamedTuple):
    """See `pipelines.training.protocol.OpenedRun`."""

    config: PretrainConfig
    folder: RunFolder
    train: Manifest
    val: Manifest | None  # if None, nothing is measured on held-out images
    pretrained: CheckpointManifest | None  # of the checkpoint that the run starts from

    @property
    def identity(self) -> Identity:
        config, digest = self.config, self.train.digest
        inputs = {"data.train": fingerprint(config.data.train, with_names=False)}
        tags = driver.run_tags(STAGE, seed=config.seed, output=self.folder.uri)
        if config.init_from is not None and self.pretrained is not None:
            inputs["init_from"] = fingerprint(config.init_from)
            tags |= lineage_tags(config.init_from, self.pretrained)
        return Identity(
            digest,
            inputs,
            data={"train": (digest, str(config.data.train))},
            tags=tags,
        )

    def reuse(self, done: StageResult) -> StageResult | None:
        """Return the earlier result with the evaluation that is asked for; None if missing."""
        evaluation = self.folder.read_evaluation(evaluation_key(self.config))
        if evaluation is None:
            logger.info("%s is trained already; its evaluation is computed again", self.folder.uri)
            return None
        metrics = done.metrics.items()
        trained = {name: x for name, x in metrics if not name.startswith(MEASURED_PREFIXES)}
        return done._replace(status="reused", metrics=evaluation | trained)

    def plan(self) -> PlannedRun:
        # Imported here, because a finished run is found without torch, Ray and MLflow.
        with without_collecting():
            from pipelines.training.pretrain_run import plan_pretraining

        return plan_pretraining(self.config, self.train, self.val)


def check_init_from(config: PretrainConfig) -> CheckpointManifest | None:
    """Check that the weights to start from exist and fit, before any worker is started."""
    uri = config.init_from
    if uri is None:
        return None
    manifest = fetch_manifest(uri)
    model = manifest.model
    if manifest.origin is not None and manifest.origin.format == AUTHORS_FORMAT:
        # The authors' files do not say how many heads the decoder has, and the shapes of the
        # weights do not show it.
        heads = config.model.decoder.num_heads
        decoder = model.decoder.model_copy(update={"num_heads": heads})
        model = model.model_copy(update={"decoder": decoder})
    names = ["encoder", "patch_size", "in_chans", "class_tokens"]  # positions depend on img_size
    pairs = [(name, getattr(model, name), getattr(config.model, name)) for name in names]
    if manifest.decoder_present:
        pairs += [
            (f"decoder.{name}", getattr(model.decoder, name), getattr(config.model.decoder, name))
            for name in ("kind", "dim", "depth", "num_heads")  # the rest changes no weight
        ]
    for name, theirs, ours in pairs:
        if theirs != ours:
            raise ConfigError(
                f"init_from={uri}: was trained with model.{name}={theirs}, this run has {ours}"
            )
    if not manifest.decoder_present:
        logger.info("init_from=%s: has no decoder; a new one starts from random weights", uri)
    if manifest.classes:
        logger.info("init_from=%s: its head for %s is not used", uri, manifest.stage)
    logger.info(
        "init_from=%s: the optimizer is new, the steps count from 0, and images are normalized as "
        "data.stats=%s says",
        uri,
        config.data.stats,
    )
    return manifest

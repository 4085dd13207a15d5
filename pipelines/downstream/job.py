"""What a downstream run trains, as its workers are told, and the data that is left of it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import ray.data

from mae_core.checkpoint import CheckpointManifest
from mae_core.config import ModelConfig
from mae_core.data.manifest import ShardInfo
from mae_core.data.order import ChainedOrder, RunOrder
from pipelines.config.downstream import DownstreamConfig
from pipelines.downstream.task import Arm, Task
from pipelines.reading.sequence import (
    SequencePlan,
    configure_ray_data,
    passes_per_block,
    sequence_dataset,
)
from pipelines.reading.shards import Rows
from pipelines.training.checkpoints import resume_position
from pipelines.training.run_folder import RunFolder
from pipelines.training.stopping import StopChannel

FORWARD_SPEED = 3  # times that of a step on the same images


class TuningJob(NamedTuple):
    """All that a worker is told."""

    config_type: type[DownstreamConfig]
    raw_config: dict[str, Any]
    make_task: Callable[[], Task]
    targets: tuple[str, ...]  # extensions that hold an image's label
    classes: tuple[str, ...]
    init_uri: str  # of the pretrained checkpoint
    run_uri: str
    start: str  # see RunFolder
    run_id: str | None  # MLflow's
    arms: tuple[Arm, ...]
    rows: tuple[tuple[Rows, ...], ...]  # of each arm, of each training shard
    train_shards: tuple[ShardInfo, ...]
    val_shards: tuple[ShardInfo, ...]
    data_digest: str
    encoder: CheckpointManifest  # with the image size that is trained on
    pretrained: ModelConfig  # as it was pretrained: its positions are stretched over other sizes

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.run_uri, self.start)

    @property
    def channel(self) -> StopChannel:
        return StopChannel(self.start)

    @property
    def config(self) -> DownstreamConfig:
        return self.config_type.model_validate(self.raw_config)

    def measuring_steps(self, arm: Arm) -> float:
        """How many steps it about takes to measure this arm and those after it."""
        images = sum(shard.num_samples for shard in self.val_shards)
        left = len(self.arms) - self.arms.index(arm)
        return left * images / (FORWARD_SPEED * self.config.optim.global_batch_size)

    @property
    def is_trained(self) -> bool:
        return any(arm.steps for arm in self.arms)

    @property
    def total_steps(self) -> int:
        return self.arms[-1].last_step


def remaining_data(job: TuningJob) -> ray.data.Dataset:
    """The arms' sequences, one after the other, from the newest whole checkpoint on."""
    job.folder.check_start()
    job.folder.raise_failure()
    job.folder.check_writable()
    configure_ray_data()
    # Nothing is read while an arm is measured, however long that takes.
    ray.data.DataContext.get_current().execution_no_progress_timeout_s = -1
    config = job.config
    trained = [(arm, rows) for arm, rows in zip(job.arms, job.rows, strict=True) if arm.steps]
    order = ChainedOrder(
        tuple(
            RunOrder(
                counts=np.asarray([len(part) for part in rows], dtype=np.int64),
                seed=arm.seed,
                window=config.data.shuffle_window,
                num_samples=arm.steps * config.optim.global_batch_size,
            )
            for arm, rows in trained
        )
    )
    plan = SequencePlan(
        job.train_shards,
        order,
        resume_position(job.run_uri),
        config.optim.micro_batch_size,
        num_workers=config.scaling.num_workers,
        rows=tuple(part for _, rows in trained for part in rows),
        targets=job.targets,
    )
    size = sum(s.num_bytes for s in job.train_shards) / sum(s.num_samples for s in job.train_shards)
    return sequence_dataset(replace(plan, passes_per_block=passes_per_block(plan, size)))

"""One process that trains the arms of a downstream run and measures each."""

import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray.data
import ray.train
import ray.train.torch
import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from infra import tracking, transfers
from mae_core.checkpoint import (
    CheckpointRecord,
    load_encoder,
    load_training_state,
    load_weights,
    save_checkpoint,
)
from mae_core.data.pixels import CorruptSampleError
from mae_core.data.randomness import named_generator
from mae_core.model.encoder import build_encoder
from mae_core.optim import warmup_cosine
from mae_core.train_step import optimizer_step
from pipelines.downstream.job import TuningJob
from pipelines.downstream.measuring import Measurer, NotMeasuredError, to_images, write_evaluation
from pipelines.downstream.task import Arm, Batch, EncodedSample, Evaluation, Example, arm_of_step
from pipelines.outcome import ConfigError
from pipelines.reading.batches import BadSample, ahead, autocast_dtype, check_place
from pipelines.reading.sample_trace import SampleTrace
from pipelines.reading.sequence import (
    micro_batches,
)
from pipelines.training.checkpoints import (
    commit_checkpoint,
    fetch_checkpoint,
    find_checkpoint,
)
from pipelines.training.reporting import (
    After,
    RunSize,
    StepReporter,
    bad_samples_error,
    too_many_bad,
)
from pipelines.training.stopping import Decision, Phase, StepEnds

logger = logging.getLogger(__name__)

BATCHES_AHEAD = 2
LOSS_METRIC = "train/loss"


def tuning_worker(arguments: dict[str, TuningJob]) -> None:
    """Ray Train's entry: runs in each worker, and again in each after one was lost."""
    job = arguments["task"]
    try:
        _Worker(job).run()
    except Exception as error:
        job.folder.record_failure(error)
        raise


class _DecodedBatch(NamedTuple):
    examples: list[Example | None]
    bad: list[BadSample]
    rows: pa.Table


class _Worker:
    def __init__(self, job: TuningJob) -> None:
        self.job = job
        self.config = config = job.config
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            torch.set_num_threads(config.scaling.cpus_per_worker)
        self.task = job.make_task()
        self.pool = ThreadPoolExecutor(config.scaling.cpus_per_worker, thread_name_prefix="decode")
        self.autocast_dtype = autocast_dtype(config.optim.precision, self.device)
        self.ends = StepEnds(
            job.channel,
            every_minutes=config.checkpoint.every_minutes,
            rank=self.rank,
            world_size=self.world_size,
        )
        self.measurer = Measurer(
            task=self.task,
            encoder=job.encoder,
            targets=job.targets,
            max_bad_ratio=config.data.max_bad_ratio,
            batch_size=config.optim.micro_batch_size,
            pool=self.pool,
            device=self.device,
            rank=self.rank,
            world_size=self.world_size,
            tell=self.ends.measured,
        )
        self.num_passes = 0  # micro batches of this worker since it started

    def run(self) -> None:
        with ExitStack() as stack:
            workspace = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            pretrained = fetch_checkpoint(self.job.init_uri, workspace / "pretrained").folder
            found = find_checkpoint(self.job.run_uri, workspace / "own")
            done = found.manifest.step if found else 0
            self.first_step = done
            trace = stack.enter_context(SampleTrace(self.config.debug.sample_trace, self.rank))
            decoded = self._decoded() if self.job.is_trained else iter(())
            # Asked once, before any worker waits for another: all get the same answer. The data
            # goes on from the checkpoint, so an arm behind it is trained again.
            finished = [
                arm
                for arm in self.job.arms
                if self.job.folder.has_arm(arm.label) and (not arm.steps or done >= arm.last_step)
            ]
            for arm in (arm for arm in self.job.arms if arm not in finished):
                model, optimizer = self._build(arm, pretrained)
                if found is not None and arm.first_step < done <= arm.last_step:
                    load_weights(found.folder, model)
                    load_training_state(found.folder, model, optimizer)
                elif arm.steps and done > arm.last_step:  # trained, and not measured
                    kept = fetch_checkpoint(
                        self.job.folder.model_uri(arm.label), workspace / arm.label
                    )
                    load_weights(kept.folder, model)
                begin = max(done, arm.first_step)
                if not self._train(arm, model, optimizer, decoded, trace, begin):
                    return
                self._finish(arm, model)

    def _build(self, arm: Arm, pretrained: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The same weights on every worker and after every start."""
        torch.manual_seed(_seed(arm.seed, "weights"))
        rate = self.config.optim.drop_path_rate if arm.name in ("finetune", "scratch") else 0.0
        if arm.name == "scratch":
            encoder = build_encoder(self.job.encoder.model, drop_path_rate=rate)
        else:
            encoder, _ = load_encoder(pretrained, drop_path_rate=rate)
        try:
            model = self.task.build_model(encoder, arm).to(self.device)
            return model, self.task.build_optimizer(model, arm)
        except ValueError as error:  # such as strides that do not tile the image
            raise ConfigError(f"arm {arm.label}: {error}") from error

    def _train(
        self,
        arm: Arm,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        decoded: Iterator[_DecodedBatch],
        trace: SampleTrace,
        done: int,
    ) -> bool:
        """Train the arm to its end; False if the run is to stop before that."""
        if done >= arm.last_step:
            return True
        wrapped = self._wrap(model)
        wrapped.train()
        with ExitStack() as stack:
            reporter = self._reporter(arm, done, stack)
            self.ends.tell(Phase.TRAINING)
            for step in range(done + 1, arm.last_step + 1):
                torch.manual_seed(_seed(arm.seed, "step", step, self.rank))
                self._step(arm, wrapped, optimizer, step, decoded, reporter, trace)
                every = self.config.checkpoint.every_steps
                is_due = step == arm.last_step or (step - arm.first_step) % every == 0
                decision = self.ends.decide(is_due=is_due)
                if decision is not Decision.GO_ON:
                    hurried = decision is Decision.STOP
                    reporter.settle(self.job.folder, self.rank, self.world_size, is_hurried=hurried)
                    self._checkpoint(arm, model, optimizer, step)
                if decision is Decision.STOP:
                    self.ends.tell(Phase.STOPPED, step)
                    return False
        self.ends.tell(Phase.MEASURING)
        if self.world_size > 1:  # measured with the statistics of the model that is kept
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)
        return True

    def _wrap(self, model: nn.Module) -> nn.Module:
        if self.world_size == 1 or not any(p.requires_grad for p in model.parameters()):
            return model
        on_gpu = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=on_gpu)

    def _reporter(self, arm: Arm, done: int, stack: ExitStack) -> StepReporter:
        """Steps are counted from the arm's own start: arms are compared at the same step."""
        job, config = self.job, self.config
        prefix = f"{arm.label}/" if sum(a.steps > 0 for a in job.arms) > 1 else ""
        writer = None
        if self.rank == 0:
            uri, metric = config.tracking.uri, prefix + LOSS_METRIC
            writer = tracking.MetricWriter(
                uri,
                job.run_id,
                after_step=tracking.last_logged_step(uri, job.run_id, metric),
                is_superseded=job.folder.is_superseded,
            )
            stack.callback(writer.close)
        batch = config.optim.global_batch_size
        size = RunSize(arm.steps, batch, arm.num_samples, 1)
        after = After((job.total_steps - arm.last_step) + job.measuring_steps(arm))
        begin = done - arm.first_step
        reporter = StepReporter(
            size, config.reporting.every_steps, begin, writer, self.ends, prefix, after
        )
        if self.rank == 0:
            logger.info(
                "%s: %d steps on %d labelled images, from step %d on",
                arm.label,
                arm.steps,
                arm.num_samples,
                done - arm.first_step,
            )
        return reporter

    def _step(
        self,
        arm: Arm,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        step: int,
        decoded: Iterator[_DecodedBatch],
        reporter: StepReporter,
        trace: SampleTrace,
    ) -> None:
        optim, own_step = self.config.optim, step - arm.first_step
        warmup = optim.warmup_epochs * arm.num_samples / optim.global_batch_size
        peak = self.task.peak_learning_rate(arm)
        learning_rate = warmup_cosine(
            own_step - 1,
            peak=peak,
            warmup_steps=min(warmup, arm.steps / 5),
            total_steps=arm.steps,
            floor=peak * optim.min_lr_ratio,
        )
        metrics = optimizer_step(
            model,
            optimizer,
            self._batches(arm, step, decoded, reporter, trace),
            partial(self.task.loss, arm=arm),
            grad_accum_steps=optim.global_batch_size // (optim.micro_batch_size * self.world_size),
            learning_rate=learning_rate,
            autocast_dtype=self.autocast_dtype,
            max_grad_norm=optim.max_grad_norm,
        )
        reporter.add(own_step, metrics)
        if not reporter.is_due(own_step):
            return
        totals = reporter.report(
            own_step,
            learning_rate=learning_rate,
            grad_norm=metrics.grad_norm,
        )
        seen = (own_step - reporter.first_step) * optim.global_batch_size
        ratio = self.config.data.max_bad_ratio
        if too_many_bad(totals, seen, ratio):
            reporter.save_bad_samples(self.job.folder, self.rank, self.world_size)
            raise bad_samples_error(totals, seen, ratio, self.job.folder)

    # Data

    def _decoded(self) -> Iterator[_DecodedBatch]:
        shard = ray.train.get_dataset_shard("train")
        rows = shard.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=2)
        return ahead(micro_batches(rows), self._decode, BATCHES_AHEAD)

    def _decode(self, table: pa.Table) -> _DecodedBatch:
        position = int(table["position"][0].as_py())
        step = position // self.config.optim.global_batch_size + 1
        arm = arm_of_step(self.job.arms, step)
        columns = [table[n].to_pylist() for n in ("shard", "key", "epoch", "image", "target")]
        samples = [EncodedSample(*values) for values in zip(*columns, strict=True)]
        made = list(self.pool.map(partial(self._example, arm=arm), samples, table["error"]))
        return _DecodedBatch(
            [x if isinstance(x, Example) else None for x in made],
            [x for x in made if isinstance(x, BadSample)],
            table.drop_columns(["image", "target"]),
        )

    def _example(self, sample: EncodedSample, error: Any, arm: Arm) -> Example | BadSample:
        why = error.as_py()
        if why is not None:
            kind = why.partition(":")[0]
            return BadSample(sample.epoch, sample.shard, sample.key, kind, why)
        try:
            return self.task.training_example(sample, arm)
        except CorruptSampleError as corrupt:
            return BadSample(sample.epoch, sample.shard, sample.key, corrupt.kind, str(corrupt))

    def _batches(
        self,
        arm: Arm,
        step: int,
        decoded: Iterator[_DecodedBatch],
        reporter: StepReporter,
        trace: SampleTrace,
    ) -> Iterator[Batch]:
        """The micro batches of one step."""
        optim = self.config.optim
        number = 0
        while True:
            since = time.monotonic()
            batch = next(decoded, None)
            reporter.waited_s += time.monotonic() - since
            if batch is None:
                return
            before = self.first_step * optim.global_batch_size
            place = self.num_passes * self.world_size + self.rank
            check_place(
                batch.rows,
                before + place * optim.micro_batch_size,
                optim.micro_batch_size,
                self.rank,
            )
            self.num_passes += 1
            reporter.count_bad(batch.bad)
            trace.write(batch.rows, [x is not None for x in batch.examples], step)
            generator = named_generator(arm.seed, "batch", step, self.rank, number)
            number += 1
            yield self._to_device(batch.examples, generator)

    def _to_device(
        self, examples: Sequence[Example | None], generator: np.random.Generator
    ) -> Batch:
        model = self.job.encoder.model
        hole = np.zeros((*model.img_size, model.in_chans), np.uint8)
        pixels = [hole if x is None else x.pixels for x in examples]
        images = to_images(pixels, self.job.encoder, self.device)
        weights = torch.tensor([float(x is not None) for x in examples], device=self.device)
        images = images * weights[:, None, None, None]
        targets = [None if x is None else x.target for x in examples]
        return Batch(images, targets, weights, generator)

    # What comes of it

    def _checkpoint(
        self, arm: Arm, model: nn.Module, optimizer: torch.optim.Optimizer, step: int
    ) -> None:
        if self.rank == 0:
            with tempfile.TemporaryDirectory() as local:
                record = self._record(arm, step)
                save_checkpoint(Path(local), record, model=model, optimizer=optimizer)
                uri = commit_checkpoint(
                    Path(local),
                    self.job.run_uri,
                    step=step,
                    keep=self.config.checkpoint.keep,
                    check=self.job.folder.check_start,
                )
            logger.info("checkpoint: %s", uri)
        ray.train.report({"step": step})

    def _record(self, arm: Arm, step: int) -> CheckpointRecord:
        encoder, batch = self.job.encoder, self.config.optim.global_batch_size
        made_as = encoder.model if arm.name == "scratch" else self.job.pretrained
        return CheckpointRecord(
            step=step,
            samples_seen=step * batch,
            epoch=(step - arm.first_step) * batch / arm.num_samples,
            total_steps=max(self.job.total_steps, 1),
            seed=arm.seed,
            data_digest=self.job.data_digest,
            channel_mean=encoder.channel_mean,
            channel_std=encoder.channel_std,
            model=made_as,
            masking=encoder.masking,
            loss=encoder.loss,
            stage=self.config.stage,
            classes=self.job.classes,
        )

    def _finish(self, arm: Arm, model: nn.Module) -> None:
        """Keep an arm's model, and measure it; a start that was cut here does it again.

        What can't be measured is noted, and costs the other arms nothing.
        """
        folder = self.job.folder
        if self.rank == 0 and arm.steps:
            with tempfile.TemporaryDirectory() as local:
                record = self._record(arm, arm.last_step)
                save_checkpoint(Path(local), record, model=model, optimizer=None)
                uri = folder.model_uri(arm.label)
                transfers.upload_folder(
                    Path(local), uri, last="manifest.json", before_last=folder.check_start
                )
        try:
            evaluation = self._evaluation(arm, model)
        except (NotMeasuredError, ValueError) as error:  # such as too few images for a penalty
            logger.error("%s can't be measured: %s", arm.label, error)
            folder.write_arm_failure(arm.label, str(error))
        else:
            if evaluation is not None:
                write_evaluation(folder, arm, evaluation)
                shown = ", ".join(f"{name}={x:.3f}" for name, x in evaluation.metrics.items())
                logger.info("%s: %s", arm.label, shown)
        if self.world_size > 1:  # nobody asks for the result before it is there
            torch.distributed.barrier()

    def _evaluation(self, arm: Arm, model: nn.Module) -> Evaluation | None:
        """Measure an arm; None on the workers that only help."""
        training: list[Any] | None = []
        if arm.steps:
            predictions = self.measurer.predictions(model, self.job.val_shards, None)
        else:  # such arms share the frozen encoder
            number = self.job.arms.index(arm)
            training = self.measurer.features(model, self.job.train_shards, self.job.rows[number])
            predictions = self.measurer.features(model, self.job.val_shards, None)
        if predictions is None or training is None:
            return None
        read = partial(self.measurer.example_at, self.job.val_shards)
        return self.task.evaluate(predictions, arm, read, training)


def _seed(*names: int | str) -> int:
    first, *rest = names
    assert isinstance(first, int)
    return int(named_generator(first, *rest).integers(2**62))

"""What classify, detect and segment each tell the one task that trains all three."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mae_core.config import ModelConfig
from mae_core.data.pixels import Pixels
from mae_core.train_step import BatchLoss
from pipelines.downstream.arms import Arm
from pipelines.reading.class_names import Numbers, folder_of


class EncodedSample(NamedTuple):
    shard: str
    key: str
    epoch: int
    image: bytes
    target: bytes | None  # what comes with the image

    @property
    def folder(self) -> str:
        return folder_of(self.shard)

    @property
    def where(self) -> str:
        return f"{self.shard}: {self.key}"


class Example(NamedTuple):
    """A sample as the model takes it."""

    pixels: Pixels  # (H, W, C)
    target: Any  # the task's own
    place: tuple[int, int] | None = None  # shard and row, of a validation sample


class Batch(NamedTuple):
    """One micro batch of one worker, on the device.

    What is drawn for an image should depend on its step and place alone, so that the split of a
    global batch into micro batches and workers changes nothing.
    """

    images: Tensor  # (B, C, H, W), normalised; a hole's are zeros
    targets: list[Any]  # (B,), the task's own; None for a hole
    weights: Tensor  # (B,), 0 for a hole
    step: int  # of the arm, from 1
    first: int  # place of the first image in the step's global batch


class Evaluation(NamedTuple):
    metrics: dict[str, float]
    pictures: dict[str, npt.NDArray[np.uint8]]  # (H, W, 3), by name
    texts: dict[str, str]  # by file name


class TaskInfo(NamedTuple):
    """What a task knows of the run."""

    model: ModelConfig  # of the encoder; img_size is what is trained on
    names: tuple[str, ...]  # of the classes
    title: str  # of pictures: run and data
    numbers: Numbers = MappingProxyType({})  # what classes are called in each folder of shards
    identifiers: tuple[int, ...] = ()  # category_id of each class, where labels are these
    # Of the encoder's normalisation: the colour of what lies beside a picture.
    channel_mean: tuple[float, ...] = (0.0,)
    ceiling: Mapping[str, float] = MappingProxyType({})  # what a perfect model could reach


class ArmStart(NamedTuple):
    """What is fitted to an arm's model before its first step.

    The training images are read without augmentation, as `Task.validation_example` gives them,
    evenly spaced over the shards and always in the same order. The model is in eval mode and
    without gradients. The number of workers changes neither the images nor the batches, so the fit
    is the same for any number of them. A run that is resumed after the first step takes the weights
    from its checkpoint and fits nothing again.
    """

    num_images: int  # at most
    outputs: Callable[[nn.Module, Tensor, Sequence[Example]], list[Any]]
    """Returns what the fit needs of each image of a batch, small enough to be gathered. The first
    argument is the model, the second the (B, C, H, W) images, normalised, on the device."""
    fit: Callable[[nn.Module, list[Any]], None]
    """Changes the model's parameters and buffers in place, given the outputs of all images. It runs
    on rank 0 alone; the other workers then get its values."""
    of_arm: bool = True  # only images whose labels the arm may use; False: any of data.train


class Task(Protocol):
    """All methods but `evaluate` and the fit of `start` run on every worker."""

    def training_example(self, sample: EncodedSample, arm: Arm) -> Example:
        """Decode and augment. Runs in threads: a function of its arguments.

        Raises:
            CorruptSampleError: the image is broken: a hole.
            DataError: the label is wrong: the run stops.
        """

    def validation_example(self, sample: EncodedSample) -> Example:
        """Decode; raises as `training_example`."""

    def build_model(self, encoder: nn.Module, arm: Arm) -> nn.Module:
        """Fresh heads are drawn from torch's global generator."""

    def start(self, arm: Arm) -> ArmStart | None:
        """Return what is fitted before the arm's first step; None leaves the model as built.

        Both an arm with a pretrained encoder and the one from random weights must get the same
        start, or their difference is not what pretraining gives.
        """

    def build_optimizer(self, model: nn.Module, arm: Arm) -> torch.optim.Optimizer:
        """Its groups may have `lr_scale`."""

    def peak_learning_rate(self, arm: Arm, base_lr: float) -> float:
        """Return the arm's largest rate; `base_lr` is the one of the config, or chosen from it."""

    def loss(self, model: nn.Module, batch: Batch, arm: Arm) -> BatchLoss:
        """Compute the loss of a micro batch."""

    def predict(self, model: nn.Module, images: Tensor, examples: Sequence[Example]) -> list[Any]:
        """One prediction an example, small enough to be gathered; with its truth."""

    def evaluate(
        self,
        predictions: list[Any],
        arm: Arm,
        read: Callable[[tuple[int, int]], Example],
        training: list[Any],
    ) -> Evaluation:
        """Metrics and pictures of all predictions.

        `read` gives a validation example again, by its place. `training` are the predictions for
        the arm's training samples, if the arm trains nothing.
        """

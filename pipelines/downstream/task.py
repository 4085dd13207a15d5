"""Define what classify, detect and segment each provide for the task that trains all three."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mae_core.config import ModelConfig
from mae_core.data.pixels import Pixels
from mae_core.model.family import Encoder
from mae_core.train_step import BatchLoss
from pipelines.downstream.arms import Arm
from pipelines.reading.class_names import Numbers, folder_of

TargetT = TypeVar("TargetT")
WantedT = TypeVar("WantedT")  # target of a training example: what its loss depends on
TruthT = TypeVar("TruthT")  # target of a validation example: what a prediction is compared with
PredictionT = TypeVar("PredictionT")


class EncodedSample(NamedTuple):
    shard: str
    key: str
    epoch: int
    image: bytes
    target: bytes | None  # file that belongs to the image

    @property
    def folder(self) -> str:
        return folder_of(self.shard)

    @property
    def where(self) -> str:
        return f"{self.shard}: {self.key}"


class Example(NamedTuple, Generic[TargetT]):
    """A sample in the form in which the model takes it."""

    pixels: Pixels  # (H, W, C)
    target: TargetT
    place: tuple[int, int] | None = None  # shard and row; only for a validation sample


class Batch(NamedTuple, Generic[WantedT]):
    """One micro batch of one worker, on the device.

    Random draws for an image should depend only on its step and its place, so that splitting a
    global batch into micro batches and workers changes nothing.
    """

    images: Tensor  # (B, C, H, W), normalised; zeros for a hole
    targets: list[WantedT | None]  # (B,), None for a hole
    weights: Tensor  # (B,), 0 for a hole
    step: int  # counts from 1 at the arm's start
    first: int  # place of the first image in the step's global batch


class Evaluation(NamedTuple):
    metrics: dict[str, float]
    pictures: dict[str, npt.NDArray[np.uint8]]  # (H, W, 3), by name
    texts: dict[str, str]  # by file name


class TaskInfo(NamedTuple):
    """What a task knows about the run."""

    model: ModelConfig  # of the encoder; img_size is the size of the training images
    names: tuple[str, ...]  # of the classes
    title: str  # beginning of the pictures' titles: run and data
    # For each folder of shards, its class numbers to the run's.
    numbers: Numbers = MappingProxyType({})
    identifiers: tuple[int, ...] = ()  # category_id of each class, if labels have one
    # From the encoder's normalisation; used as the colour beside a picture.
    channel_mean: tuple[float, ...] = (0.0,)
    ceiling: Mapping[str, float] = MappingProxyType({})  # scores that a perfect model could reach


class FitInput(NamedTuple):
    """What a fit takes from one image; small, because it is gathered from all workers."""

    values: npt.NDArray[np.float32]  # (D,) one vector for the image, or (N, D) for places in it
    label: npt.NDArray[np.int64] | None = None  # only if the fit needs labels


class ArmStart(NamedTuple, Generic[TruthT]):
    """A fit of an arm's model to images before its first step.

    The training images are read without augmentation, as `Task.validation_example` gives them,
    evenly spaced over the shards and always in the same order. The model is in eval mode and
    without gradients. The number of workers changes neither the images nor the batches, so the fit
    is the same for any number of them. A run that is resumed after the first step takes the weights
    from its checkpoint and fits nothing again.
    """

    num_images: int  # largest number of images
    inputs: Callable[[nn.Module, Tensor, Sequence[Example[TruthT]]], list[FitInput]]
    """Returns what the fit takes from each image of a batch. The first argument is the model, the
    second the (B, C, H, W) images, normalised, on the device."""
    fit: Callable[[nn.Module, list[FitInput]], None]
    """Changes the model's parameters and buffers in place, given the inputs from all images. It
    runs on rank 0 alone; the other workers then get its values."""
    # If True, only images whose labels the arm may use; otherwise any of data.train.
    of_arm: bool = True


class Measured(Protocol[TruthT, PredictionT]):
    """What is needed to measure a task's models. Every worker calls both methods."""

    def validation_example(self, sample: EncodedSample) -> Example[TruthT]:
        """Decode a sample as it is, without augmentation; raises as `Task.training_example`."""

    def predict(
        self, model: nn.Module, images: Tensor, examples: Sequence[Example[TruthT]]
    ) -> list[PredictionT]:
        """Return one prediction for each example, with its truth, small enough to be gathered."""


class Task(Measured[TruthT, PredictionT], Protocol[WantedT, TruthT, PredictionT]):
    """What a stage adds. Every worker calls all methods but `evaluate` and the fit of `start`."""

    def training_example(self, sample: EncodedSample, arm: Arm) -> Example[WantedT]:
        """Decode and augment a sample.

        Several threads call this at once, so the result may depend on the arguments alone.

        Raises:
            CorruptSampleError: the image is broken: a hole.
            DataError: the label is wrong: the run stops.
        """

    def build_model(self, encoder: Encoder, arm: Arm) -> nn.Module:
        """Put the arm's head on the encoder; a new head is drawn from torch's global generator."""

    def start(self, arm: Arm) -> ArmStart[TruthT] | None:
        """Return what is fitted before the arm's first step; None leaves the model as it was built.

        An arm with a pretrained encoder and the same arm from random weights must start in the same
        way; otherwise their difference is not due to pretraining alone.
        """

    def build_optimizer(self, model: nn.Module, arm: Arm) -> torch.optim.Optimizer:
        """Build the arm's optimizer; its groups may have `lr_scale`."""

    def peak_learning_rate(self, arm: Arm, base_lr: float) -> float:
        """Return the arm's largest learning rate; `base_lr` is from the config or from trials."""

    def loss(self, model: nn.Module, batch: Batch[WantedT], arm: Arm) -> BatchLoss:
        """Compute the loss of a micro batch."""

    def evaluate(
        self,
        predictions: list[PredictionT],
        arm: Arm,
        read: Callable[[tuple[int, int]], Example[TruthT]],
        training: list[PredictionT],
    ) -> Evaluation:
        """Compute the metrics of all predictions, and draw their pictures.

        Args:
            predictions: for all validation samples.
            arm: whose model made them.
            read: returns a validation example again, given its place.
            training: predictions for the arm's training samples, if the arm trains nothing.
        """

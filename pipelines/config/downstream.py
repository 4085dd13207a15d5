"""Configs of the stages that start from a checkpoint: classify, detect, segment."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from infra.config import StorageConfig, TrackingConfig
from mae_core.config import StrictConfig, as_square
from mae_core.data.label_budget import LabelBudget
from pipelines.config.arms import ArmKind, Trains
from pipelines.config.roles import identity_digest
from pipelines.config.sections import (
    CheckpointConfig,
    DebugConfig,
    StartConfig,
    TrainScalingConfig,
    fitted_batches,
    fitted_window,
)

Share = float  # in (0, 1]
Rate = Annotated[float, Field(gt=0)]
Value = Annotated[int, Field(ge=0, le=65_535)]  # value of a mask's pixel


class LabelledDataConfig(StrictConfig):
    train: str | tuple[str, ...]
    """Labelled training shards: a folder, an s3://bucket/prefix, a pattern with
    {000000..000099}.tar, a tar, or a list of these."""
    val: str | tuple[str, ...]
    """Labelled shards used to measure the result, in the same form."""
    shuffle_window: int = Field(default=1024, gt=0)
    """Number of samples that are shuffled together, after the shards; a multiple of the micro
    batch. The default is rounded up to one."""
    max_bad_ratio: float = Field(default=0.01, ge=0, le=1)
    """The run stops if a larger share of the samples can't be used."""


class TuningOptimConfig(StrictConfig):
    """The defaults are those for fine-tuning ViT-B in He et al. 2021, table 9."""

    base_lr: Rate | tuple[Rate, ...] = 5e-4
    """Learning rate at a global batch of 256; it is scaled linearly. If several are given, each
    kind of arm gets the one that is best on a held fifth of the training labels, by the mean over
    the seeds; this costs one more training for each rate. linear has a rate of its own."""
    global_batch_size: int = Field(default=1024, gt=0)
    """Images per optimizer step, summed over all workers and accumulation steps."""
    micro_batch_size: int = Field(default=64, gt=0)
    """Images per worker and forward pass."""
    epochs: float = Field(default=100, gt=0)
    """Passes over the labelled samples for each arm; a fraction ends in the middle of an epoch."""
    max_steps: int | None = Field(default=None, gt=0)
    """Largest number of optimizer steps of an arm: the same budget for much and for little
    data."""
    warmup_epochs: float = Field(default=5, ge=0)
    """Number of epochs during which the learning rate rises from 0; at most a fifth of the
    steps."""
    min_lr_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Share of the learning rate at which the cosine ends."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Applied to tensors of two or more dimensions."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates for its two moments."""
    layer_decay: float = Field(default=0.65, gt=0, le=1)
    """Learning rate factor from each encoder block to the block below it (BEiT, Bao et al. 2021);
    an encoder trained from scratch has the same rate everywhere."""
    head_lr_scale: float = Field(default=1.0, gt=0)
    """Factor on the learning rate of all that is not the encoder, in every arm."""
    drop_path_rate: float = Field(default=0.1, ge=0, lt=1)
    """Stochastic depth of the encoder's last block, rising from 0 at the first."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Clip gradients to this norm."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: use autocast where the device supports it (CUDA)."""

    @field_validator("base_lr")
    @classmethod
    def _different_rates(cls, base_lr: float | tuple[float, ...]) -> float | tuple[float, ...]:
        if isinstance(base_lr, tuple) and (not base_lr or len(set(base_lr)) < len(base_lr)):
            raise ValueError(f"base_lr={list(base_lr)}: give at least one rate, each only once")
        return base_lr

    @property
    def rates(self) -> tuple[float, ...]:
        """The values of `base_lr` to choose from."""
        return self.base_lr if isinstance(self.base_lr, tuple) else (self.base_lr,)

    def scaled(self, base_lr: float) -> float:
        """Scale a rate linearly, Goyal et al. 2017, https://arxiv.org/abs/1706.02677."""
        return base_lr * self.global_batch_size / 256


class ArmsConfig(StrictConfig):
    """What is trained and compared: each arm, with each share of the labels and each seed."""

    arms: tuple[str, ...]
    label_fraction: tuple[Share, ...] = (1.0,)
    """Shares of the labelled training samples, equal for each class; each arm is trained once for
    every share."""
    seeds: tuple[int, ...] = (0,)
    """Each seed chooses samples, order, augmentation and fresh weights; several give a spread."""

    @field_validator("label_fraction")
    @classmethod
    def _shares(cls, fractions: tuple[float, ...]) -> tuple[float, ...]:
        if not fractions or not all(0 < fraction <= 1 for fraction in fractions):
            raise ValueError(f"label_fraction={list(fractions)}: each must be above 0, at most 1")
        if len(set(fractions)) < len(fractions):
            raise ValueError(f"label_fraction={list(fractions)}: give each only once")
        return fractions

    @field_validator("seeds")
    @classmethod
    def _some_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError(f"seeds={list(seeds)}: give different numbers from 0 on")
        return seeds

    @field_validator("arms")
    @classmethod
    def _each_arm_once(cls, arms: tuple[str, ...]) -> tuple[str, ...]:
        if not arms or len(set(arms)) < len(arms):
            raise ValueError(f"arms={list(arms)}: give at least one, each only once")
        return arms

    @property
    def label_budgets(self) -> tuple[LabelBudget, ...]:
        """How many labels the arms are trained with: each of these in turn."""
        return tuple(LabelBudget(share) for share in self.label_fraction)

    @property
    def metric(self) -> str:
        """The metric that arms are compared by; more is better."""
        raise NotImplementedError

    @property
    def kinds(self) -> tuple[ArmKind, ...]:
        """The kinds of arm that are compared."""
        return tuple(ArmKind[word.upper()] for word in self.arms)

    def takes_steps(self, kind: ArmKind) -> bool:
        """Return whether an arm of this kind is trained by an optimizer in this stage."""
        return kind.trains is not Trains.NOTHING

    def uses_base_lr(self, kind: ArmKind) -> bool:
        """Return whether `optim.base_lr` is the learning rate of this kind of arm."""
        return self.takes_steps(kind) and kind is not ArmKind.LINEAR


class TuningReportConfig(StrictConfig):
    every_steps: int = Field(default=10, gt=0)
    """Optimizer steps between metrics."""


class DownstreamConfig(StartConfig):
    """The fields that classify, detect and segment have in common."""

    name: str = Field(default="", pattern=r"^([A-Za-z0-9][A-Za-z0-9_.-]*)?$")
    """Prefix of the run's name, by default the stage; a hash of all that determines the result
    follows."""
    data: LabelledDataConfig
    img_size: tuple[int, int] | None = None
    """Height and width of the training images, in pixels; one number means a square. By default
    the checkpoint's; otherwise positions are interpolated."""
    optim: TuningOptimConfig = TuningOptimConfig()
    scaling: TrainScalingConfig = TrainScalingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    reporting: TuningReportConfig = TuningReportConfig()
    storage: StorageConfig = StorageConfig()
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    debug: DebugConfig = DebugConfig()

    stage: ClassVar[str]

    @field_validator("img_size", mode="before")
    @classmethod
    def _one_number_is_a_square(cls, raw: object) -> object:
        return as_square(raw)

    @model_validator(mode="after")
    def _defaults_fit(self) -> Self:
        """Adapt the defaults to the user's values, so that a default is never the mistake."""
        optim = fitted_batches(self.optim, self.scaling.num_workers, self.images_per_draw)
        object.__setattr__(self, "optim", optim)  # the model is frozen
        object.__setattr__(self, "data", fitted_window(self.data, optim.micro_batch_size))
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        optim, workers = self.optim, self.scaling.num_workers
        if optim.global_batch_size % (optim.micro_batch_size * workers):
            raise ValueError(
                f"optim.global_batch_size={optim.global_batch_size} is not a multiple of "
                f"optim.micro_batch_size={optim.micro_batch_size} x scaling.num_workers={workers}"
            )
        if self.data.shuffle_window % optim.micro_batch_size:
            raise ValueError(
                f"data.shuffle_window={self.data.shuffle_window} is not a multiple of "
                f"optim.micro_batch_size={optim.micro_batch_size}"
            )
        return self

    @property
    def section(self) -> ArmsConfig:
        """The stage's own section."""
        raise NotImplementedError

    @property
    def images_per_draw(self) -> int:
        """Neighbouring images of a global batch that no micro batch may separate."""
        return 1

    @property
    def depends_on_split(self) -> bool:
        """Whether the split of a global batch changes the result by more than rounding."""
        draws_paths = not {ArmKind.FINETUNE, ArmKind.SCRATCH}.isdisjoint(self.section.arms)
        return draws_paths and self.optim.drop_path_rate != 0

    @property
    def run_name(self) -> str:
        """Name and a hash of all that determines the result: the same command, the same run."""
        values = self.model_dump(mode="json")
        if self.depends_on_split:
            values["split"] = [self.optim.micro_batch_size, self.scaling.num_workers]
        digest = identity_digest(self.stage, values)
        return f"{self.name or self.stage}-{digest}"


ClassifyArm = Literal["knn", "logistic", "linear", "attentive", "finetune", "scratch", "untrained"]


class ClassifySection(ArmsConfig):
    arms: tuple[ClassifyArm, ...] = ("logistic", "finetune", "scratch", "untrained")
    """knn: nearest neighbours of frozen features; logistic: logistic regression on them; linear:
    the paper's linear probe (batch norm, LARS, augmented images); attentive: a learned query that
    weighs the patches of a frozen encoder, and a linear head; finetune: all weights, or the last
    `trainable_blocks`; scratch: like finetune, from random weights; untrained: like logistic, on
    an encoder with random weights."""
    labels_per_class: tuple[int, ...] = ()
    """Few-shot: train on this many labelled images of each class, or on all of a class that has
    fewer, instead of on `label_fraction`; each arm is trained once for every number. With
    `labels=many`, so many of each combination of findings."""
    labels: Literal["one", "many"] = "one"
    """one: each sample has one class; many: each has any number of findings."""
    label_key: str | None = None
    """Key in the samples' .json that holds the class, or the list of findings. By default .cls is
    read: a number, or several for many."""
    names: tuple[str, ...] | None = None
    """Class names in the order of their numbers. By default those in the manifest, those listed in
    classes.json beside the shards, or the numbers."""
    pool: Literal["mean", "cls"] = "mean"
    """Input of the classifier: the mean of the patch tokens, or the class token."""
    head_start: Literal["logistic", "zero"] = "logistic"
    """How the head of finetune, scratch and attentive starts. logistic: as a logistic regression on
    at most 5,000 of the arm's images (LP-FT, Kumar et al. 2022); zero: near zero, as in He et al.
    2021, which needs many steps."""
    trainable_blocks: int | None = Field(default=None, ge=0)
    """Number of the encoder's last blocks that finetune trains; by default all."""
    linear_base_lr: float = Field(default=0.1, gt=0)
    """The linear probe's `base_lr` (LARS), He et al. 2021, section A.1."""
    k: int = Field(default=20, gt=0)
    """Number of neighbours that vote."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area that a random crop covers."""
    eval_crop: float = Field(default=1.0, gt=0, le=1)
    """Share of an image's sides that the central crop covers when it is measured. The paper's is
    0.875: it resizes the short side to 256 and cuts 224."""
    flip: bool = True
    """Mirror half of the images."""
    rand_augment: float = Field(default=9.0, ge=0, le=10)
    """Magnitude of RandAugment (Cubuk et al. 2019); 0 turns it off; linear never uses it."""
    random_erase: float = Field(default=0.25, ge=0, le=1)
    """Share of the images in which a rectangle is erased (Zhong et al. 2017)."""
    mixup: float = Field(default=0.8, ge=0)
    """Alpha of mixup (Zhang et al. 2017); 0 turns it off."""
    cutmix: float = Field(default=1.0, ge=0)
    """Alpha of CutMix (Yun et al. 2019); 0 turns it off."""
    smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Share of the label that is spread over all classes."""

    @field_validator("labels_per_class")
    @classmethod
    def _numbers_of_labels(cls, counts: tuple[int, ...]) -> tuple[int, ...]:
        if any(count < 1 for count in counts) or len(set(counts)) < len(counts):
            raise ValueError(f"labels_per_class={list(counts)}: give different numbers from 1 on")
        return counts

    @property
    def label_budgets(self) -> tuple[LabelBudget, ...]:
        shots = tuple(LabelBudget(count, is_share=False) for count in self.labels_per_class)
        return shots or super().label_budgets

    @property
    def metric(self) -> str:
        return "top1" if self.labels == "one" else "auroc"

    @property
    def mixes(self) -> bool:
        """Whether images are blended in pairs."""
        return self.mixup > 0 or self.cutmix > 0

    @model_validator(mode="after")
    def _neighbours_have_one_class(self) -> Self:
        if self.labels == "many" and ArmKind.KNN in self.kinds:
            raise ValueError("the arm knn needs labels=one; logistic takes labels=many")
        return self

    def takes_steps(self, kind: ArmKind) -> bool:
        """Return False also for `untrained`: logistic regression is fitted without steps."""
        return super().takes_steps(kind) and kind is not ArmKind.UNTRAINED


class ClassifyConfig(DownstreamConfig):
    stage: ClassVar[str] = "classify"
    classify: ClassifySection = ClassifySection()

    @property
    def section(self) -> ClassifySection:
        return self.classify

    @property
    def images_per_draw(self) -> int:
        share = self.optim.global_batch_size // self.scaling.num_workers
        is_odd = "global_batch_size" in self.optim.model_fields_set and share % 2 == 1
        return 2 if self.classify.mixes and not is_odd else 1

    @property
    def depends_on_split(self) -> bool:
        """Whether the split changes the result; the batch norm of `linear` sees a micro batch."""
        return super().depends_on_split or ArmKind.LINEAR in self.section.arms

    @model_validator(mode="after")
    def _pairs_stay_together(self) -> Self:
        is_mixed = self.classify.mixes and any(kind.trains_encoder for kind in self.section.kinds)
        if is_mixed and self.optim.micro_batch_size % 2:
            raise ValueError(
                f"optim.micro_batch_size={self.optim.micro_batch_size} is odd, but mixup and "
                "CutMix blend pairs of images: give an even number, or classify.mixup=0 and "
                "classify.cutmix=0"
            )
        return self


class DenseOptimConfig(TuningOptimConfig):
    """Detect and segment: the head is large and new, so that it learns faster than the encoder."""

    base_lr: Rate | tuple[Rate, ...] = 1e-4
    """Learning rate of the encoder at a global batch of 256; it is scaled linearly. If several are
    given, each kind of arm gets the one that is best on a held fifth of the training labels, by the
    mean over the seeds; this costs one more training for each rate."""
    head_lr_scale: float = Field(default=20.0, gt=0)
    """Factor on the learning rate of the pyramid and the head, in every arm."""


DenseArm = Literal["finetune", "frozen", "scratch", "untrained"]


class DenseSection(ArmsConfig):
    """The fields that detect and segment have in common."""

    arms: tuple[DenseArm, ...] = ("finetune", "scratch", "untrained")
    """finetune: train the pretrained encoder and the head; frozen: only the head; scratch: like
    finetune, from random weights; untrained: like frozen, on an encoder with random weights."""
    conditioning: Literal["whiten", "standardize", "none"] = "whiten"
    """Change of the encoder's map before the head. In every arm it is fixed before the first step,
    from training images without labels. whiten: every direction gets the variance 1; standardize:
    every channel does; none: no change."""
    window: int = Field(default=0, ge=0)
    """Side, in patches, of the windows that limit attention, for large images; 0: no windows."""
    flip: bool = True
    """Mirror half of the images."""


class DetectSection(DenseSection):
    head: Literal["fcos", "faster_rcnn"] = "fcos"
    """Detector on the pyramid: FCOS (Tian et al. 2019) or Faster R-CNN (Ren et al. 2015)."""
    categories: dict[int, str] | None = None
    """Maps category_id to name. By default the categories of the training samples, named by
    categories.json beside the shards or by their numbers."""
    strides: tuple[int, ...] = (8, 16, 32)
    """Stride of each level of the pyramid: pixels per place of its map."""
    channels: int = Field(default=128, gt=0)
    """Channels of each level."""
    num_convs: int = Field(default=2, gt=0)
    """Number of 3x3 convolutions in the head."""
    scale: tuple[float, float] = (0.7, 1.5)
    """Large-scale jitter: smallest and largest factor on the picture fitted into `img_size`."""

    @property
    def metric(self) -> str:
        return "ap"


class DetectConfig(DownstreamConfig):
    stage: ClassVar[str] = "detect"
    optim: DenseOptimConfig = DenseOptimConfig()
    detect: DetectSection = DetectSection()

    @property
    def section(self) -> DetectSection:
        return self.detect


class SegmentSection(DenseSection):
    head: Literal["linear", "fpn", "upernet"] = "fpn"
    """linear: a 1x1 convolution; fpn: a fused pyramid (Kirillov et al. 2019);
    upernet: a pyramid with pooling (Xiao et al. 2018)."""
    masks: Literal["classes", "instances"] = "classes"
    """Content of .seg.png: a class per pixel (see `values` and `ignore_value`), or numbered
    instances, which become background, inside and boundary."""
    names: tuple[str, ...] | None = None
    """Class names in the order of their numbers; required for `masks=classes`."""
    values: tuple[Value, ...] | None = None
    """Values of the classes in the masks, in the order of `names`, such as [0,255] for masks of 0
    and 255. By default 0, 1, 2 and so on."""
    ignore_value: Value | None = 255
    """Value of pixels that neither the loss nor the scores count, unless it is in `values`; null:
    every pixel counts."""
    boundary: int = Field(default=2, gt=0)
    """Width in pixels of the class boundary of `masks=instances`. A narrow one is lost between the
    places of the head's output; a wide one leaves no inside of small instances."""
    stride: int | None = Field(default=None, gt=0)
    """Pixels per place of the head's output, for fpn and upernet: the patch size divided by a power
    of two. By default 4, or the nearest above it that the patch allows. Half of it takes about four
    times as long for the head and shows finer objects; see `ceiling/miou`."""
    channels: int = Field(default=128, gt=0)
    """Channels of the head."""
    scale: tuple[float, float] = (0.7, 1.5)
    """Smallest and largest factor on the picture before the random crop."""
    class_weights: tuple[float, ...] | None = None
    """Factor on the loss of each class's pixels, in the order of their numbers, by default 1.
    Raise it for classes with few pixels, which hardly count otherwise."""
    overlap: float = Field(default=0.5, ge=0, lt=1)
    """Share of a window that the next one also covers, for images larger than `img_size`."""

    @property
    def metric(self) -> str:
        return "miou"

    @model_validator(mode="after")
    def _only_a_pyramid_has_a_stride(self) -> Self:
        if self.head == "linear" and self.stride is not None:
            raise ValueError(f"stride={self.stride} needs head=fpn or head=upernet")
        return self

    @model_validator(mode="after")
    def _each_class_has_a_weight(self) -> Self:
        num_classes = 3 if self.masks == "instances" else len(self.names or ())
        if self.class_weights is not None and len(self.class_weights) != num_classes:
            raise ValueError(
                f"class_weights={list(self.class_weights)}: {len(self.class_weights)} for "
                f"{num_classes} classes"
            )
        return self

    @model_validator(mode="after")
    def _each_class_has_a_value(self) -> Self:
        values = self.values
        if values is not None and self.masks == "instances":
            raise ValueError("values needs masks=classes: instances have no fixed values")
        if values is not None and not len(values) == len(set(values)) == len(self.names or ()):
            raise ValueError(
                f"values={list(values)}: give one value for each of {len(self.names or ())} names, "
                "each only once"
            )
        return self

    @model_validator(mode="after")
    def _classes_have_names(self) -> Self:
        if self.masks == "classes" and self.names is None:
            raise ValueError(
                "segment.names is needed for masks=classes: the class names, in the order of "
                "their numbers"
            )
        return self


class SegmentConfig(DownstreamConfig):
    stage: ClassVar[str] = "segment"
    optim: DenseOptimConfig = DenseOptimConfig()
    segment: SegmentSection

    @property
    def section(self) -> SegmentSection:
        return self.segment

"""Every setting of the core. Nothing here depends on where the code runs.

Imports pydantic only, so a config can be checked on a laptop without torch or Ray.
"""

from typing import Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class StrictConfig(BaseModel):
    """Base of every config: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )


def as_square(raw: object) -> object:
    """Return both sides where a size is given as one number: `224` or `[224]`."""
    if isinstance(raw, list | tuple) and len(raw) == 1:
        raw = raw[0]
    return (raw, raw) if isinstance(raw, int) and not isinstance(raw, bool) else raw


class EncoderShape(NamedTuple):
    embed_dim: int
    depth: int
    num_heads: int


ViTName = Literal[
    "vit_nano", "vit_micro", "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"
]
ConvName = Literal[
    "resnet18",
    "resnet50",
    "convnextv2_atto",
    "convnextv2_femto",
    "convnextv2_pico",
    "convnextv2_nano",
    "convnextv2_tiny",
    "convnextv2_base",
]
EncoderName = Literal[ViTName, ConvName]

# tiny and small: Touvron et al. 2021, https://arxiv.org/abs/2012.12877, table 1; base, large and
# huge: Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, table 1; nano and micro: ours.
ENCODERS: dict[str, EncoderShape] = {
    "vit_nano": EncoderShape(embed_dim=96, depth=4, num_heads=3),
    "vit_micro": EncoderShape(embed_dim=192, depth=6, num_heads=3),
    "vit_tiny": EncoderShape(embed_dim=192, depth=12, num_heads=3),
    "vit_small": EncoderShape(embed_dim=384, depth=12, num_heads=6),
    "vit_base": EncoderShape(embed_dim=768, depth=12, num_heads=12),
    "vit_large": EncoderShape(embed_dim=1024, depth=24, num_heads=16),
    "vit_huge": EncoderShape(embed_dim=1280, depth=32, num_heads=16),
}

# Channels of the four stages, as in timm's models of these names.
CONV_ENCODERS: dict[str, tuple[int, int, int, int]] = {
    "resnet18": (64, 128, 256, 512),
    "resnet50": (256, 512, 1024, 2048),
    "convnextv2_atto": (40, 80, 160, 320),
    "convnextv2_femto": (48, 96, 192, 384),
    "convnextv2_pico": (64, 128, 256, 512),
    "convnextv2_nano": (80, 160, 320, 640),
    "convnextv2_tiny": (96, 192, 384, 768),
    "convnextv2_base": (128, 256, 512, 1024),
}
CONV_STRIDE = 32  # of timm's models: pixels per place of the last map
CONV_STRIDES = (32, 16, 8, 4)  # that ours can have; see `model.patch_size`


class DecoderShape(NamedTuple):
    dim: int
    depth: int
    num_heads: int


# base and larger: He et al. 2021, table 1. The decoder sees all patches and the encoder a quarter
# of them, so beside a small encoder theirs would take most of the time.
DECODERS: dict[str, DecoderShape] = {
    "vit_nano": DecoderShape(dim=64, depth=1, num_heads=2),
    "vit_micro": DecoderShape(dim=96, depth=2, num_heads=3),
    "vit_tiny": DecoderShape(dim=192, depth=4, num_heads=6),
    "vit_small": DecoderShape(dim=256, depth=4, num_heads=8),
    "resnet18": DecoderShape(dim=256, depth=4, num_heads=8),
    "convnextv2_atto": DecoderShape(dim=192, depth=4, num_heads=6),
    "convnextv2_femto": DecoderShape(dim=192, depth=4, num_heads=6),
    "convnextv2_pico": DecoderShape(dim=256, depth=4, num_heads=8),
    "convnextv2_nano": DecoderShape(dim=256, depth=4, num_heads=8),
}
LARGE_DECODER = DecoderShape(dim=512, depth=8, num_heads=16)

DecoderKind = Literal["transformer", "deconvolution", "cross_attention"]


class DecoderConfig(StrictConfig):
    kind: DecoderKind = "transformer"
    """transformer: the tokens of kept patches and a mask token for each other one attend to each
    other (He et al. 2021); deconvolution: convolutions and transposed convolutions from the
    encoder's map to the pixels, with skips from the finer maps of a convolutional encoder (SparK,
    Tian et al. 2023); cross_attention: mask tokens attend to the kept patches alone, which costs
    less the fewer are predicted (CrossMAE, Fu et al. 2024). The default of a convolutional encoder
    is deconvolution."""
    dim: int = Field(default=512, gt=0, multiple_of=4)
    """Width of the decoder's tokens, or of its coarsest map; each doubling of a map's sides halves
    it. A small encoder has a smaller default: nano 64, micro 96, tiny 192, small 256; resnet18 and
    ConvNeXt pico and nano 256, atto and femto 192."""
    depth: int = Field(default=8, ge=1)
    """Transformer blocks. A small encoder has a smaller default: nano 1, micro 2, tiny and
    small 4, as have resnet18 and ConvNeXt up to nano. For `kind=deconvolution`: 3x3 convolutions at
    each scale, by default 1."""
    num_heads: int = Field(default=16, ge=1)
    """Attention heads; the number must divide `dim`. By default one for about 32 values. Without
    effect if `kind=deconvolution`."""

    prediction_ratio: float = Field(default=1.0, gt=0, le=1)
    """Share of the removed patches that is decoded and scored in a training step, a random one for
    random masks. Fewer cost less: 0.33 of 75 % halves the decoder's work (Fu et al. 2024,
    https://arxiv.org/abs/2401.14391). Pictures and held-out losses are of all."""

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Self:
        if self.dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide dim={self.dim}")
        return self

    @model_validator(mode="after")
    def _deconvolutions_predict_all(self) -> Self:
        if self.kind == "deconvolution" and self.prediction_ratio != 1:
            raise ValueError(
                f"prediction_ratio={self.prediction_ratio}: kind=deconvolution computes the whole "
                "picture, so that predicting a part would save nothing; set 1"
            )
        return self


def _num_heads(dim: int) -> int:
    """Return a number of heads that divides a width, of about 32 values each."""
    return next(heads for heads in range(max(1, dim // 32), 0, -1) if dim % heads == 0)


class ModelConfig(StrictConfig):
    encoder: EncoderName = "vit_base"
    """A ViT, as width x depth: nano 96x4, micro 192x6, tiny 192x12, small 384x12, base 768x12,
    large 1024x24, huge 1280x32; or a convolutional encoder of timm: ResNet or ConvNeXt V2, trained
    by masked convolutions (SparK)."""
    img_size: tuple[int, int] = (224, 224)
    """Height and width of the training crop, in pixels; one number means a square."""
    patch_size: int = Field(default=16, gt=0)
    """Side of a square patch, in pixels. For a convolutional encoder this is its stride, the pixels
    per place of its last map: 32 by default, as in timm; 16, 8 or 4 for small images, where the
    first layers keep the resolution."""
    in_chans: int = Field(default=3, gt=0)
    """Channels of an image."""
    class_tokens: int = Field(default=1, ge=1)
    """Tokens of a ViT that belong to no patch. Pixio takes 8, which give a large encoder room for
    what is of the whole picture."""
    decoder: DecoderConfig = DecoderConfig()

    @model_validator(mode="before")
    @classmethod
    def _one_number_is_a_square(cls, raw: object) -> object:
        if isinstance(raw, dict) and "img_size" in raw:
            return {**raw, "img_size": as_square(raw["img_size"])}
        return raw

    @model_validator(mode="before")
    @classmethod
    def _the_default_decoder_is_the_encoders(cls, raw: object) -> object:
        """Complete the patch size and the decoder by defaults that fit the encoder."""
        if not isinstance(raw, dict):
            return raw
        encoder = raw.get("encoder")
        is_convolutional = isinstance(encoder, str) and encoder in CONV_ENCODERS
        if is_convolutional:
            raw = {"patch_size": CONV_STRIDE, **raw}
        if not isinstance(given := raw.get("decoder", {}), dict):
            return raw
        kind = given.get("kind", "deconvolution" if is_convolutional else "transformer")
        shape = DECODERS.get(encoder) if isinstance(encoder, str) else None
        if shape is None and kind != "deconvolution":
            return {**raw, "decoder": {**given, "kind": kind}} if is_convolutional else raw
        shape = shape or LARGE_DECODER
        if kind == "deconvolution":
            shape = shape._replace(depth=1)
        dim = given.get("dim", shape.dim)
        if isinstance(dim, int) and dim > 0 and dim % shape.num_heads:
            shape = shape._replace(num_heads=_num_heads(dim))
        return {**raw, "decoder": {**shape._asdict(), **given, "kind": kind}}

    @model_validator(mode="after")
    def _convolutions_have_few_strides(self) -> Self:
        if self.is_convolutional and self.patch_size not in CONV_STRIDES:
            raise ValueError(
                f"patch_size={self.patch_size} is the stride of encoder={self.encoder}, which can "
                f"be {', '.join(map(str, CONV_STRIDES))}"
            )
        return self

    @model_validator(mode="after")
    def _convolutions_have_no_tokens(self) -> Self:
        if self.is_convolutional and self.class_tokens != 1:
            raise ValueError(
                f"class_tokens={self.class_tokens}: encoder={self.encoder} has no class token; "
                "leave it out"
            )
        return self

    @model_validator(mode="after")
    def _patches_tile_the_image(self) -> Self:
        height, width = self.img_size
        if height < 1 or width < 1 or height % self.patch_size or width % self.patch_size:
            is_stride = f", the stride of encoder={self.encoder}" if self.is_convolutional else ""
            raise ValueError(
                f"img_size={height}x{width} is not a multiple of patch_size={self.patch_size}"
                f"{is_stride}"
            )
        return self

    @property
    def is_convolutional(self) -> bool:
        return self.encoder in CONV_ENCODERS

    @property
    def has_batch_norm(self) -> bool:
        """Whether the result depends on the split of a global batch into micro batches."""
        return self.encoder.startswith("resnet")

    @property
    def encoder_shape(self) -> EncoderShape:
        """Width, depth and heads of a ViT."""
        return ENCODERS[self.encoder]

    @property
    def grid_size(self) -> tuple[int, int]:
        """Number of patch rows and patch columns."""
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]


class MaskingConfig(StrictConfig):
    kind: Literal["random", "block", "inverse_block", "grid", "uniform", "cell"] = "random"
    """random: each patch on its own; block: remove rectangles (BEiT); inverse_block: keep one
    rectangle (CAPI); grid: keep the top left patch of every 2x2; uniform: keep as many random
    patches of every 2x2 (UM-MAE); cell: keep or remove whole cells (Pixio)."""
    mask_ratio: float | tuple[float, ...] = 0.75
    """Share of patches removed from the encoder's input. Two shares, such as [0.6, 0.75]: those of
    the first and the last step, between which it changes evenly. Pictures and held-out losses have
    the last."""
    cell: int = Field(default=2, gt=0)
    """Side of a cell in patches, for `kind=cell`."""

    @field_validator("mask_ratio")
    @classmethod
    def _shares(cls, ratio: float | tuple[float, ...]) -> float | tuple[float, ...]:
        shares = ratio if isinstance(ratio, tuple) else (ratio, ratio)
        if len(shares) != 2 or not all(0 < share < 1 for share in shares):
            shown = list(ratio) if isinstance(ratio, tuple) else ratio
            raise ValueError(
                f"mask_ratio={shown}: give a share between 0 and 1, or two: of the first step and "
                "of the last"
            )
        return ratio

    @model_validator(mode="after")
    def _grid_has_one_ratio(self) -> Self:
        if self.kind == "grid" and self.mask_ratio != 0.75:
            raise ValueError(
                f"kind=grid keeps one patch of four: mask_ratio must be 0.75, not {self.mask_ratio}"
            )
        return self

    @property
    def ratios(self) -> tuple[float, float]:
        """The shares of the first and the last step."""
        ratio = self.mask_ratio
        return (ratio[0], ratio[1]) if isinstance(ratio, tuple) else (ratio, ratio)

    @property
    def last_ratio(self) -> float:
        return self.ratios[1]

    @property
    def is_scheduled(self) -> bool:
        return self.ratios[0] != self.ratios[1]

    def ratio_at(self, step: int, total_steps: int) -> float:
        """Return the share of a step; steps count from 1."""
        first, last = self.ratios
        return first + (last - first) * (step - 1) / max(total_steps - 1, 1)


class LossConfig(StrictConfig):
    kind: Literal["mse", "l1", "smooth_l1"] = "mse"
    """How far a predicted pixel is from the target: its squared error (He et al. 2021), its size
    (SimMIM), or the square below 1 and the size above."""
    fourier_weight: float = Field(default=0.0, ge=0)
    """Weight of a second term: the distance between the spectra of a patch, which counts fine
    texture more. 0 leaves it out."""
    ssim_weight: float = Field(default=0.0, ge=0)
    """Weight of a third term: 1 - the likeness of structure (SSIM) of a patch. 0 leaves it out."""
    norm_pix: bool = True
    """Normalize each target patch to zero mean and unit variance (He et al. 2021, section 4.1)."""
    norm_pix_floor: float = Field(default=1e-3, gt=0)
    """Added to a patch's variance in that normalization, so that a flat patch does not turn its
    noise into the target. The unit is the variance of the whole data set: 0.001 is a deviation of
    about 2 grey levels of 255. The authors' code has 0.000001. Without effect if `norm_pix` is
    false."""

    @property
    def target_floor(self) -> float | None:
        """`norm_pix_floor`, or None if the target is the pixels themselves."""
        return self.norm_pix_floor if self.norm_pix else None


class OptimConfig(StrictConfig):
    base_lr: float = Field(default=1.5e-4, gt=0)
    """Learning rate at a global batch of 256; see `learning_rate`."""
    global_batch_size: int = Field(default=4096, gt=0)
    """Images per optimizer step, summed over all workers and accumulation steps."""
    micro_batch_size: int = Field(default=64, gt=0)
    """Images per worker and forward pass; gradients are accumulated up to the global batch."""
    epochs: float = Field(default=800, gt=0)
    """Passes over the data; a fraction ends in the middle of an epoch."""
    max_steps: int | None = Field(default=None, gt=0)
    """Stop after this many optimizer steps, if `epochs` has not ended the run earlier."""
    warmup_epochs: float = Field(default=40, ge=0)
    """Number of epochs during which the learning rate rises from 0; at most a fifth of the
    steps."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Applied to tensors of two or more dimensions; biases and norms are exempt."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates for its two moments."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Clip gradients to this norm. The reference does not; try it if the loss jumps or is not
    finite."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: use autocast where the device supports it (CUDA); master weights stay fp32."""
    compile: bool = False
    """Compile the model with torch.compile (CUDA only)."""

    @property
    def learning_rate(self) -> float:
        """Learning rate after linear scaling, Goyal et al. 2017, https://arxiv.org/abs/1706.02677."""
        return self.base_lr * self.global_batch_size / 256

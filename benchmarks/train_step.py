"""Time a training step of the masked autoencoder: ours, transformers' and lightly's, in turn.

    python benchmarks/train_step.py --device cpu --encoders vit_micro,vit_small
    python benchmarks/train_step.py --device cuda --encoders vit_base,vit_large --compile
    python benchmarks/train_step.py --ours-only --encoders resnet18,vit_small \
        --decoders transformer,cross_attention:0.25,deconvolution

All have the same shapes, the same maths (full decoder, targets normalised per patch, AdamW in one
kernel) and the same precision: fp32 on a CPU, bf16 autocast on a GPU. Each round times one after
the other, so that other work on the machine meets all of them; a ratio is the median of the ratios
of the rounds. On a CPU, the time is that of all threads, which other work hardly changes.

Columns: images a second; the ratio to transformers; the share of the device's own rate in matrix
products of 4096 x 4096 (2048 on a CPU), counting the products of the whole reference model for
everyone; the peak of the memory. lightly is left out where it is not installed.

`--decoders` adds a row of ours for each kind of decoder, with the share of the removed patches that
it predicts: cross_attention:0.25. With `--ours-only`, ratios are to the first row, which is the
encoder with its default decoder; the patch size of a convolutional encoder is its stride.
"""

import argparse
import gc
import importlib
import importlib.util
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, cast

import torch
import transformers
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae_core.config import LossConfig, MaskingConfig, ModelConfig, OptimConfig
from mae_core.masking import num_patches_kept
from mae_core.model.mae import build_mae
from mae_core.optim import build_optimizer
from mae_core.train_step import MicroBatch, optimizer_step, pretrain_loss

FLOOR = 1e-6  # of the variance of a target patch, as in both other codes
WARMUP_STEPS = 3
GIB = 2**30

Step = Callable[[], None]


class Row(NamedTuple):
    """What one contender reached with one model."""

    contender: str
    images_per_s: list[float]  # one for each round
    peak_bytes: int


def main() -> None:
    args = parse_arguments()
    torch.set_float32_matmul_precision("high" if args.device == "cuda" else "highest")
    print(
        f"device: {device_name(args.device)}; torch {torch.__version__}; "
        f"threads {torch.get_num_threads()}"
    )
    rate = matmul_rate(args.device)
    print(f"matrix products: {rate / 1e12:.3g} TFLOP/s\n")
    of = "the first row" if args.ours_only else "transformers"
    print(f"| model | code | images/s | of {of} | of the matmul rate | peak GiB |")
    print("|---|---|---|---|---|---|")
    for encoder in args.encoders.split(","):
        model = model_config(encoder, args.img_size, args.patch_size)
        rows = compare(model, args)
        reference = next((row for row in rows if row.contender == "transformers"), rows[0])
        ideal_s = None if model.is_convolutional else step_flops(model) / rate
        for row in rows:
            print(line(encoder, row, reference, ideal_s), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--encoders", default="vit_micro,vit_small,vit_base")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--patch-size", type=int, help="by default 16, or the encoder's stride, 32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each contender in a round")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of ours")
    parser.add_argument("--prediction-ratio", type=float, default=1.0, help="one more row of ours")
    parser.add_argument("--decoders", default="", help="one more row of ours for each KIND[:SHARE]")
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--no-memory", action="store_true", help="do not measure its peak")
    return parser.parse_args()


def model_config(encoder: str, img_size: int, patch_size: int | None) -> ModelConfig:
    fields: dict[str, object] = {"encoder": encoder, "img_size": img_size}
    return ModelConfig.model_validate(
        fields if patch_size is None else {**fields, "patch_size": patch_size}
    )


def with_decoder(model: ModelConfig, named: str) -> ModelConfig:
    """Return the model with another kind of decoder, KIND or KIND:SHARE, of its default size."""
    kind, _, share = named.partition(":")
    fields = model.model_dump(mode="json")
    fields["decoder"] = {"kind": kind, "prediction_ratio": float(share or 1)}
    return ModelConfig.model_validate(fields)


def partial_prediction(model: ModelConfig, ratio: float) -> ModelConfig:
    decoder = model.decoder.model_copy(update={"prediction_ratio": ratio})
    return model.model_copy(update={"decoder": decoder})


def compare(model: ModelConfig, args: argparse.Namespace) -> list[Row]:
    """Time every contender in every round, after its memory was measured alone."""
    builders: dict[str, Callable[[], Step]] = {"ours": partial(our_step, model, args)}
    partial_model = partial_prediction(model, args.prediction_ratio)
    if args.prediction_ratio < 1:
        name = f"ours, {args.prediction_ratio:g} predicted"
        builders[name] = partial(our_step, partial_model, args)
    for named in filter(None, args.decoders.split(",")):
        kind, _, share = named.partition(":")
        name = f"ours, {kind}" + (f", {share} predicted" if share else "")
        builders[name] = partial(our_step, with_decoder(model, named), args)
    if args.compile:
        builders["ours, compiled"] = partial(our_step, model, args, compiled=True)
    if not args.ours_only:
        builders["transformers"] = partial(transformers_step, model, args)
        if importlib.util.find_spec("lightly") is not None:
            builders["lightly"] = partial(lightly_step, model, args)
    peaks = {
        name: 0 if args.no_memory else peak_bytes(build, args.device)
        for name, build in builders.items()
    }
    steps = {name: build() for name, build in builders.items()}
    for step in steps.values():
        for _ in range(WARMUP_STEPS):
            step()
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            rates[name].append(args.batch / seconds_a_step(step, args.device, args.seconds))
    return [Row(name, rates[name], peaks[name]) for name in builders]


def seconds_a_step(step: Step, device: str, seconds: float) -> float:
    """Repeat the step for about `seconds` of wall clock."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    synchronize(device)
    began, began_clock, count = time.perf_counter(), clock(), 0
    while count == 0 or time.perf_counter() - began < seconds:
        step()
        count += 1
        if device == "cuda" and count % 4 == 0:  # or the queue grows for as long as it may
            synchronize(device)
    synchronize(device)
    threads = 1 if device == "cuda" else torch.get_num_threads()
    return (clock() - began_clock) / count / threads


def our_step(model: ModelConfig, args: argparse.Namespace, *, compiled: bool = False) -> Step:
    torch.manual_seed(0)
    loss = LossConfig(norm_pix_floor=FLOOR)
    mae = build_mae(model, MaskingConfig(), loss).to(args.device)
    optimizer = build_optimizer(mae, OptimConfig(), fused=True)
    trained = cast(nn.Module, torch.compile(mae, dynamic=False)) if compiled else mae
    images, noise = inputs(model, args)
    batch = MicroBatch(images, noise, torch.ones(args.batch, device=args.device))
    dtype = torch.bfloat16 if args.device == "cuda" else None

    def step() -> None:
        optimizer_step(
            trained,
            optimizer,
            [batch],
            pretrain_loss,
            grad_accum_steps=1,
            learning_rate=1e-4,
            autocast_dtype=dtype,
        )

    return step


def transformers_step(model: ModelConfig, args: argparse.Namespace) -> Step:
    shape, decoder = model.encoder_shape, model.decoder
    config = transformers.ViTMAEConfig(
        hidden_size=shape.embed_dim,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.num_heads,
        intermediate_size=4 * shape.embed_dim,
        image_size=model.img_size[0],
        patch_size=model.patch_size,
        decoder_hidden_size=decoder.dim,
        decoder_num_hidden_layers=decoder.depth,
        decoder_num_attention_heads=decoder.num_heads,
        decoder_intermediate_size=4 * decoder.dim,
        norm_pix_loss=True,
        layer_norm_eps=1e-6,
    )
    config._attn_implementation = "sdpa"
    net = transformers.ViTMAEForPreTraining(config).to(args.device).train()
    images, noise = inputs(model, args)
    return plain_step(net, lambda: net(images, noise=noise).loss, args.device)


def lightly_step(model: ModelConfig, args: argparse.Namespace) -> Step:
    net = lightly_mae(model).to(args.device).train()
    images, _ = inputs(model, args)
    return plain_step(net, lambda: net(images), args.device)


def lightly_mae(model: ModelConfig) -> nn.Module:
    """Put lightly's blocks together as its own example of MAE does."""
    utils = importlib.import_module("lightly.models.utils")
    modules = importlib.import_module("lightly.models.modules")
    shape, decoder = model.encoder_shape, model.decoder
    vit = VisionTransformer(
        img_size=model.img_size[0],
        patch_size=model.patch_size,
        embed_dim=shape.embed_dim,
        depth=shape.depth,
        num_heads=shape.num_heads,
        num_classes=0,
        global_pool="token",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pixel_decoder = modules.MAEDecoderTIMM(
            num_patches=model.num_patches,
            patch_size=model.patch_size,
            embed_dim=shape.embed_dim,
            decoder_embed_dim=decoder.dim,
            decoder_depth=decoder.depth,
            decoder_num_heads=decoder.num_heads,
        )

    class LightlyMAE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = modules.MaskedVisionTransformerTIMM(vit=vit)
            self.decoder = pixel_decoder

        def forward(self, images: Tensor) -> Tensor:
            size = (len(images), 1 + model.num_patches)
            kept, removed = utils.random_token_mask(
                size=size, mask_ratio=0.75, device=images.device
            )
            embedded = self.decoder.embed(self.backbone.encode(images=images, idx_keep=kept))
            tokens = utils.repeat_token(self.decoder.mask_token, size)
            tokens = utils.set_at_index(tokens, kept, embedded.type_as(tokens))
            decoded = utils.get_at_index(self.decoder.decode(tokens), removed)
            patches = utils.patchify(images, model.patch_size)
            target = utils.get_at_index(patches, removed - 1)
            target = utils.normalize_mean_var(target, dim=-1)
            return nn.functional.mse_loss(self.decoder.predict(decoded), target)

    return LightlyMAE()


def plain_step(net: nn.Module, loss_of: Callable[[], Tensor], device: str) -> Step:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = loss_of()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def inputs(model: ModelConfig, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    images = torch.randn(args.batch, model.in_chans, *model.img_size, device=args.device)
    return images, torch.rand(args.batch, model.num_patches, device=args.device)


def step_flops(model: ModelConfig) -> int:
    """Count the floating-point operations in matrix products for an image, there and back.

    Two for each multiplication, and the way back costs twice the way there. The decoder is the
    reference's: it computes all patches.
    """
    shape, decoder = model.encoder_shape, model.decoder
    values = model.in_chans * model.patch_size**2
    kept = num_patches_kept(model.num_patches, MaskingConfig().mask_ratio)
    products = kept * values * shape.embed_dim
    products += shape.depth * block_products(1 + kept, shape.embed_dim)
    products += (1 + kept) * shape.embed_dim * decoder.dim
    products += decoder.depth * block_products(1 + model.num_patches, decoder.dim)
    products += model.num_patches * decoder.dim * values
    return 3 * 2 * products


def block_products(tokens: int, dim: int) -> int:
    return tokens * 12 * dim**2 + 2 * tokens**2 * dim


def matmul_rate(device: str) -> float:
    """Measure FLOP/s of large matrix products in the precision that the step uses."""
    size, dtype = (4096, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    repeats = 20 if device == "cuda" else 3

    def multiply() -> None:
        for _ in range(repeats):
            left @ right

    multiply()
    return repeats * 2 * size**3 / min(seconds_a_step(multiply, device, 0.5) for _ in range(3))


def peak_bytes(build: Callable[[], Step], device: str) -> int:
    """Return the largest memory of two steps: of the GPU, or of a process of their own."""
    if device == "cuda":
        return peak_on_gpu(build)
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(peak_of_process, build).result()


def peak_on_gpu(build: Callable[[], Step]) -> int:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step = build()
    step()
    step()
    return torch.cuda.max_memory_allocated()


def peak_of_process(build: Callable[[], Step]) -> int:
    """Return what the steps add to the memory of a process that has imported everything."""
    before = resident_kib()
    step = build()
    step()
    step()
    return 1024 * (resident_kib() - before)


def resident_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(":")[1].strip() for x in info if x.startswith("model name")), "CPU")


def line(encoder: str, row: Row, reference: Row, seconds_at_full_rate: float | None) -> str:
    rates = sorted(row.images_per_s)
    middle = statistics.median(rates)
    ratios = [a / b for a, b in zip(row.images_per_s, reference.images_per_s, strict=True)]
    share = "" if seconds_at_full_rate is None else f"{middle * seconds_at_full_rate:.2f}"
    return (
        f"| {encoder} | {row.contender} | {middle:.4g} ({rates[0]:.4g} to {rates[-1]:.4g}) "
        f"| {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) "
        f"| {share} | {row.peak_bytes / GIB:.2f} |"
    )


if __name__ == "__main__":
    main()

"""Time the training step without each of its savings alone (see docs/adr/0034).

    OMP_NUM_THREADS=1 python benchmarks/step_savings.py --encoders vit_micro --img-size 32

Each row undoes one saving: all patches are embedded and the kept ones taken out; the decoder's last
block and the prediction are computed for every token; targets are made for all patches; the ids
come from two sorts; the optimizer is not fused. Rounds take turns, and a ratio is the median of the
ratios of the rounds to the step as it is. Takes the options of train_step.py.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import cast
from unittest.mock import patch

import torch
import train_step
from jaxtyping import Float, Int
from timm.models.vision_transformer import Block
from torch import Tensor

from mae_core import optim
from mae_core.masking import PatchMask, mask_from_noise
from mae_core.model import decoder, encoder, mae
from mae_core.model.positions import resample_positions
from mae_core.patching import patchify


def embed_all(
    self: encoder.MaskedEncoder, images: Tensor, ids_keep: Tensor | None = None
) -> Tensor:
    positions = resample_positions(self.positions, self.grid_size, self._grid(images))
    patches = cast(Tensor, self.patch_embed(images) + positions)
    return patches if ids_keep is None else take(patches, ids_keep)


def all_tokens(block: Block, tokens: Tensor, count: int) -> Tensor:
    """Compute the block for all tokens, and leave the choice of the removed ones to `predict`."""
    return cast(Tensor, block(tokens))[:, -count:]


def all_targets(images: Tensor, patch_size: int, ids: Int[Tensor, "B N"]) -> Float[Tensor, "B N P"]:
    patches = patchify(images, patch_size)
    return take(mae.normalize_patches(patches, floor=train_step.FLOOR), ids)


def two_sorts(noise: Float[Tensor, "B L"], mask_ratio: float) -> PatchMask:
    noise.argsort(dim=1, stable=True).argsort(dim=1)
    return mask_from_noise(noise, mask_ratio)


def take(patches: Tensor, ids: Tensor) -> Tensor:
    return patches.gather(1, ids[:, :, None].expand(-1, -1, patches.shape[2]))


@contextmanager
def targets_of_all_patches() -> Iterator[None]:
    with (
        patch.object(mae, "take_patches", all_targets),
        patch.object(mae, "normalize_patches", lambda patches, floor: patches),
    ):
        yield


UNDONE: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "as it is": nullcontext,
    "all patches embedded": partial(patch.object, encoder.MaskedEncoder, "_embed", embed_all),
    "last block of all tokens": partial(patch.object, decoder, "_last_tokens", all_tokens),
    "targets of all patches": targets_of_all_patches,
    "two sorts": partial(patch.object, mae, "mask_from_noise", two_sorts),
    "an optimizer that is not fused": nullcontext,
}


def main() -> None:
    args = train_step.parse_arguments()
    print(f"{train_step.device_name(args.device)}; batches of {args.batch}; {args.rounds} rounds\n")
    print("| model | without the saving | time of a step, times |\n|---|---|---|")
    for name in args.encoders.split(","):
        model = train_step.model_config(name, args.img_size, args.patch_size)
        steps = {}
        for undone in UNDONE:
            is_fused = "not fused" not in undone
            with patch.object(
                train_step, "build_optimizer", partial(build_optimizer, is_fused=is_fused)
            ):
                steps[undone] = train_step.our_step(model, args)
        seconds: dict[str, list[float]] = {undone: [] for undone in UNDONE}
        for number in range(-1, args.rounds):
            for undone, context in UNDONE.items():
                with context():
                    taken = train_step.seconds_a_step(steps[undone], args.device, args.seconds)
                if number >= 0:  # the first round warms up
                    seconds[undone].append(taken)
        for undone, taken_in in seconds.items():
            ratios = [a / b for a, b in zip(taken_in, seconds["as it is"], strict=True)]
            spread = f"({min(ratios):.3f} to {max(ratios):.3f})"
            print(f"| {name} | {undone} | {statistics.median(ratios):.3f} {spread} |", flush=True)


def build_optimizer(
    model: mae.MaskedAutoencoder, config: optim.OptimConfig, *, fused: bool, is_fused: bool
) -> torch.optim.Optimizer:
    return optim.build_optimizer(model, config, fused=fused and is_fused)


if __name__ == "__main__":
    main()

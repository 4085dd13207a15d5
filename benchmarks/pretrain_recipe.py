"""Compare settings of a pretraining on small labelled images by a short training in one process.

    OMP_NUM_THREADS=1 python benchmarks/pretrain_recipe.py CONFIG VIEWS [key=value ...]

Trains on the first 80 % of the training images for VIEWS views, in a plain loop without Ray, and
scores the frozen encoder on the last 20 %: the test set takes no part in the choice of a recipe.
VIEWS=0 scores the untrained encoder. Prints one line of JSON; compare lines of equal CPU time.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from infra import storage
from infra.shard_spec import expand_shards
from mae_core.config import ModelConfig
from mae_core.data.decode import decode_image
from mae_core.data.pixels import Pixels
from mae_core.data.randomness import named_generator
from mae_core.data.samples import iter_samples
from mae_core.data.transforms import cut_view, random_crop
from mae_core.data.views import normalize
from mae_core.evaluation.classification import encode_features, knn_accuracy
from mae_core.evaluation.feature_health import feature_health
from mae_core.evaluation.linear_probe import linear_probe_accuracy
from mae_core.masking import draw_noise
from mae_core.model.encoder import MaskedEncoder
from mae_core.model.mae import MaskedAutoencoder, build_mae
from mae_core.optim import build_optimizer, warmup_cosine
from mae_core.train_step import MicroBatch, optimizer_step, pretrain_loss
from pipelines.config.loading import load_config
from pipelines.config.pretrain import PretrainConfig

NUM_PROBED = 10_000  # training images of the probe
WARMUP_SHARE = 0.06
BATCH = 500


def main(file: str, num_views: int, words: list[str]) -> None:
    config = load_config(PretrainConfig, [Path(file)], words, {})
    pixels, labels = load(config.data.train, config.model.in_chans)
    num_train = len(pixels) * 4 // 5
    scaled = pixels[:num_train].reshape(-1, pixels.shape[-1]) / np.iinfo(pixels.dtype).max
    stats = tuple(scaled.mean(0).tolist()), tuple(scaled.std(0).tolist())
    torch.manual_seed(config.seed)
    mae = build_mae(config.model, config.masking, config.loss)
    began_s = time.process_time()
    loss = train(mae, config, pixels[:num_train], stats, num_views)
    cpu_s = time.process_time() - began_s

    bank, held = slice(0, min(NUM_PROBED, num_train)), slice(num_train, None)
    features = [encode(mae.encoder, pixels[part], stats, config.model) for part in (bank, held)]
    scored = features[0], labels[bank], features[1], labels[held]
    found = {
        "words": words,
        "views": num_views,
        "linear": round(linear_probe_accuracy(*scored, seed=config.seed), 4),
        "knn": round(knn_accuracy(*scored), 4),
        "rank": round(feature_health(features[1]).rank, 1),
        "loss": round(loss, 4),
        "cpu_s": round(cpu_s),
    }
    print(json.dumps(found), flush=True)


def load(spec: str | tuple[str, ...], in_chans: int) -> tuple[Pixels, Tensor]:
    pixels: list[Pixels] = []
    labels: list[int] = []
    for shard in expand_shards(spec):
        with storage.open_stream(shard) as stream:
            for sample in iter_samples(stream, shard):
                pixels.append(decode_image(sample.image, in_chans))
                labels.append(int(sample.parts["cls"]))
    return np.stack(pixels), torch.tensor(labels)


def train(
    mae: MaskedAutoencoder,
    config: PretrainConfig,
    pixels: Pixels,
    stats: tuple[tuple[float, ...], tuple[float, ...]],
    num_views: int,
) -> float:
    """Train as `mae pretrain` does, and return the mean loss of the last tenth."""
    optim, batch = config.optim, config.optim.global_batch_size
    total = num_views // batch
    optimizer = build_optimizer(mae, optim, fused=True)
    order = named_generator(config.seed, "order")
    places = np.concatenate(
        [order.permutation(len(pixels)) for _ in range(1 + num_views // len(pixels))]
    )
    losses = []
    mae.train()
    for step in range(total):
        torch.manual_seed(step)
        generator = named_generator(config.seed, "views", step)
        chosen = pixels[places[step * batch : (step + 1) * batch]]
        images = normalize(np.stack([view(x, generator, config) for x in chosen]), *stats)
        noise = np.stack([masking_noise(generator, config) for _ in chosen])
        metrics = optimizer_step(
            mae,
            optimizer,
            [MicroBatch(torch.from_numpy(images), torch.from_numpy(noise), torch.ones(batch))],
            pretrain_loss,
            grad_accum_steps=1,
            learning_rate=warmup_cosine(
                step,
                peak=optim.learning_rate,
                warmup_steps=total * WARMUP_SHARE,
                total_steps=total,
            ),
            autocast_dtype=None,
        )
        losses.append(metrics.loss.item())
    return float(np.mean(losses[-max(1, total // 10) :])) if losses else 0.0


def view(pixels: Pixels, generator: np.random.Generator, config: PretrainConfig) -> Pixels:
    crop = random_crop(generator, *pixels.shape[:2], scale=config.data.crop_scale)
    return cut_view(pixels, crop, generator, size=config.model.img_size, flip=config.data.flip)


def masking_noise(generator: np.random.Generator, config: PretrainConfig) -> np.ndarray:
    masking = config.masking
    return draw_noise(
        generator,
        config.model.grid_size,
        kind=masking.kind,
        mask_ratio=masking.mask_ratio,
        cell=masking.cell,
    )


def encode(
    encoder: MaskedEncoder,
    pixels: Pixels,
    stats: tuple[tuple[float, ...], tuple[float, ...]],
    model: ModelConfig,
) -> Tensor:
    if pixels.shape[1:3] != model.img_size:
        raise SystemExit(f"images are {pixels.shape[1:3]}, model.img_size is {model.img_size}")
    return torch.cat(
        [
            encode_features(encoder, torch.from_numpy(normalize(pixels[i : i + BATCH], *stats)))
            for i in range(0, len(pixels), BATCH)
        ]
    )


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])

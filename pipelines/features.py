"""Features of a frozen encoder over labelled shards, by Ray Data, and the kNN accuracy on them."""

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import ray.data
import torch
from torch import Tensor

from infra import storage
from mae_core.checkpoint import load_encoder
from mae_core.data.decode import CorruptSampleError, decode_image
from mae_core.data.manifest import Manifest, ShardInfo
from mae_core.data.samples import DataError
from mae_core.data.transforms import center_crop
from mae_core.data.views import normalize
from mae_core.evaluation.classification import encode_features, knn_accuracy
from mae_core.model.encoder import MaskedEncoder
from mae_core.model.mae import build_mae
from pipelines.checkpoints import FoundCheckpoint, fetch_checkpoint
from pipelines.config import PretrainConfig
from pipelines.datasets import open_shards, read_label, read_rows

logger = logging.getLogger(__name__)

ROWS_PER_TASK = 256


class LabelledFeatures(NamedTuple):
    trained: Tensor  # (N, D)
    untrained: Tensor  # (N, D), of the same encoder before its first step
    labels: Tensor  # (N,) int64


class _Slice(NamedTuple):
    shard: ShardInfo
    start: int
    stop: int


class _FeatureExtractor:
    """A Ray Data actor: reads a slice of a shard, decodes, encodes with both encoders."""

    def __init__(self, checkpoint_uri: str, seed: int, use_gpu: bool, num_threads: int) -> None:
        if not use_gpu:
            torch.set_num_threads(num_threads)
        self._device = torch.device("cuda" if use_gpu else "cpu")
        with tempfile.TemporaryDirectory() as workspace:
            found = fetch_checkpoint(checkpoint_uri, Path(workspace) / "checkpoint")
            trained, self._manifest = load_encoder(found.folder)
        self._trained = trained.to(self._device)
        self._untrained = untrained_encoder(self._manifest, seed).to(self._device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, npt.NDArray[Any]]:
        manifest, model = self._manifest, self._manifest.model
        pixels: list[npt.NDArray[np.uint8]] = []
        labels: list[int] = []
        for piece in batch["slice"]:
            for sample in read_rows(piece.shard, piece.start, piece.stop):
                label = read_label(piece.shard.path, sample)
                if label is None:
                    raise DataError(
                        f"{piece.shard.path}: {sample.key} has no .cls, which the kNN evaluation "
                        "of data.val needs; add labels, or leave data.val out"
                    )
                try:
                    image = decode_image(sample.image, model.in_chans)
                except CorruptSampleError:
                    continue
                pixels.append(center_crop(image, model.img_size))
                labels.append(label)
        if not pixels:
            empty = np.zeros((0, model.encoder_shape.embed_dim), np.float32)
            return {"trained": empty, "untrained": empty, "label": np.zeros(0, np.int64)}
        images = torch.from_numpy(
            normalize(np.stack(pixels), manifest.channel_mean, manifest.channel_std)
        ).to(self._device)
        return {
            "trained": encode_features(self._trained, images).cpu().numpy(),
            "untrained": encode_features(self._untrained, images).cpu().numpy(),
            "label": np.asarray(labels, np.int64),
        }


def untrained_encoder(manifest: Any, seed: int) -> MaskedEncoder:
    """The encoder as the run with this seed started it."""
    torch.manual_seed(seed)
    return build_mae(manifest.model, manifest.masking, manifest.loss).encoder


def extract_features(
    config: PretrainConfig, manifest: Manifest, checkpoint_uri: str, limit: int
) -> LabelledFeatures:
    """Features of the first `limit` labelled samples, in the order of the shards."""
    slices = list(_first_slices(manifest, limit))
    scaling = config.scaling
    rows = ray.data.from_items([{"slice": piece} for piece in slices]).map_batches(
        _FeatureExtractor,
        fn_constructor_args=(checkpoint_uri, config.seed, scaling.use_gpu, scaling.cpus_per_worker),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=scaling.num_workers),
        num_cpus=scaling.cpus_per_worker,
        num_gpus=1 if scaling.use_gpu else 0,
    )
    blocks = list(rows.iter_batches(batch_size=None, batch_format="numpy"))
    trained, untrained, labels = (
        torch.from_numpy(np.concatenate([block[name] for block in blocks]))
        for name in ("trained", "untrained", "label")
    )
    return LabelledFeatures(trained, untrained, labels)


def _first_slices(manifest: Manifest, limit: int) -> Iterator[_Slice]:
    left = limit
    for shard in manifest.shards:
        wanted = min(shard.num_samples, left)
        for start in range(0, wanted, ROWS_PER_TASK):
            yield _Slice(shard, start, min(start + ROWS_PER_TASK, wanted))
        left -= wanted


def knn_metrics(
    config: PretrainConfig, train: Manifest, checkpoint: FoundCheckpoint, cache_uri: str
) -> dict[str, float]:
    """Accuracy of the frozen encoder's nearest neighbours, trained and untrained."""
    assert config.data.val is not None
    val = open_shards(config.data.val, storage.join(cache_uri, "shards", "val"))
    logger.info("evaluating the frozen encoder by its nearest neighbours")
    bank = extract_features(config, train, checkpoint.uri, config.knn.max_train)
    queries = extract_features(config, val, checkpoint.uri, config.knn.max_val)
    k = min(config.knn.k, len(bank.labels))
    metrics = {
        f"knn/{name}": knn_accuracy(
            getattr(bank, which), bank.labels, getattr(queries, which), queries.labels, k=k
        )
        for name, which in (("top1", "trained"), ("top1_untrained", "untrained"))
    }
    logger.info(
        "kNN accuracy (k=%d, %d neighbours to choose from, %d test images): %.3f; untrained: %.3f",
        k,
        len(bank.labels),
        len(queries.labels),
        metrics["knn/top1"],
        metrics["knn/top1_untrained"],
    )
    return metrics

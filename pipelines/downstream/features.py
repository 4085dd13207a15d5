"""Turn images into features of a frozen encoder, and features into a table."""

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from infra.scratch import scratch_folder
from mae_core.checkpoint import load_encoder
from mae_core.checkpoint_manifest import CheckpointManifest
from mae_core.data.decode import decode_image
from mae_core.data.pixels import CorruptSampleError, Pixels
from mae_core.data.samples import Sample
from mae_core.data.transforms import center_crop
from mae_core.evaluation.classification import encode_features
from mae_core.model.family import Encoder
from pipelines.config.embed import EmbedConfig
from pipelines.downstream.measuring import to_images
from pipelines.training.checkpoints import fetch_checkpoint

logger = logging.getLogger(__name__)


class FeatureReader:
    """Turns samples into features."""

    def __init__(self, config: EmbedConfig, init_uri: str, img_size: tuple[int, int]) -> None:
        self.batch_size, self.kind, self.img_size = config.batch_size, config.features, img_size
        self.device = torch.device("cuda" if config.scaling.use_gpu else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(config.scaling.cpus_per_worker)
        self.encoder, self.manifest = _load(init_uri)
        self.encoder.to(self.device).eval()
        self.pool = ThreadPoolExecutor(config.scaling.cpus_per_worker)

    def table(self, path: str, numbered: list[tuple[int, Sample]]) -> list[pa.Table]:
        """Return a table of the samples that can be decoded; the log names the others."""
        decoded = list(self.pool.map(lambda item: self._pixels(path, item[1]), numbered))
        whole = [
            (row, sample, pixels)
            for (row, sample), pixels in zip(numbered, decoded, strict=True)
            if pixels is not None
        ]
        if not whole:
            return []
        features = self.features([pixels for *_, pixels in whole])
        return [feature_table([(row, sample) for row, sample, _ in whole], path, features)]

    def _pixels(self, path: str, sample: Sample) -> Pixels | None:
        try:
            pixels = decode_image(sample.image, self.manifest.model.in_chans)
            return center_crop(pixels, self.img_size)
        except CorruptSampleError as error:
            logger.warning("left out: shard=%s key=%s reason=%s", path, sample.key, error)
            return None

    def features(self, pixels: list[Pixels]) -> npt.NDArray[np.float32]:
        """Return (N, D) features; of a grid (N, h * w * D), row by row."""
        images = to_images(pixels, self.manifest, self.device)
        if self.kind == "grid":
            with torch.no_grad():
                tokens = self.encoder(images)[:, self.encoder.num_prefix_tokens :]
                chosen = tokens.float().flatten(1)
        else:
            chosen = encode_features(self.encoder, images, pool=self.kind)
        features: npt.NDArray[np.float32] = chosen.cpu().numpy()
        return features


def _load(init_uri: str) -> tuple[Encoder, CheckpointManifest]:
    with scratch_folder() as workspace:
        found = fetch_checkpoint(init_uri, workspace / "encoder")
        return load_encoder(found.folder, is_verified=True)


def feature_table(
    samples: list[tuple[int, Sample]], path: str, features: npt.NDArray[Any]
) -> pa.Table:
    """Return a table with shard, row, key, label and feature.

    The label is the .cls file as text, or null; all features have the same length.
    """
    labels = [sample.parts.get("cls") for _, sample in samples]
    flat = pa.array(features.astype(np.float32).ravel())
    return pa.table(
        {
            "shard": pa.array([path] * len(samples), pa.string()),
            "row": pa.array([row for row, _ in samples], pa.int64()),
            "key": pa.array([sample.key for _, sample in samples], pa.string()),
            "label": pa.array(
                [None if x is None else x.decode(errors="replace") for x in labels], pa.string()
            ),
            "feature": pa.FixedSizeListArray.from_arrays(flat, features.shape[1]),
        }
    )

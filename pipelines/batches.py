"""From blocks of encoded images to batches on the device, ahead of the training step."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from mae_core.config import MaskingConfig
from mae_core.data.decode import CorruptSampleError
from mae_core.data.transforms import Pixels
from mae_core.data.views import ViewSpec, mask_generator, training_view
from mae_core.masking import draw_noise
from pipelines.config import PretrainConfig


def view_spec(config: PretrainConfig) -> ViewSpec:
    return ViewSpec(
        seed=config.seed,
        in_chans=config.model.in_chans,
        size=config.model.img_size,
        crop_scale=config.data.crop_scale,
        flip=config.data.flip,
    )


class BadSample(NamedTuple):
    shard: str
    key: str
    reason: str


class DecodedBatch(NamedTuple):
    """One micro batch of one worker. A sample that can't be decoded is a hole of weight 0."""

    pixels: Tensor  # (B, H, W, C) uint8
    noise: Tensor  # (B, L) float32
    weights: Tensor  # (B,) float32, 0 for a hole
    bad: list[BadSample]
    rows: pa.Table  # the block, without the image column

    @property
    def first_position(self) -> int:
        return int(self.rows["position"][0].as_py())


class BatchDecoder:
    """Decodes blocks with a pool of threads: Pillow and NumPy let go of the GIL."""

    def __init__(
        self, spec: ViewSpec, masking: MaskingConfig, grid_size: tuple[int, int], num_threads: int
    ) -> None:
        self._spec = spec
        self._masking = masking
        self._grid_size = grid_size
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")

    def __call__(self, table: pa.Table) -> DecodedBatch:
        rows = table.drop_columns(["image"])
        shards, keys = rows["shard"].to_pylist(), rows["key"].to_pylist()
        epochs = rows["epoch"].to_pylist()
        images, decoded = table["image"].to_pylist(), table["decoded"].to_pylist()
        views = list(self._pool.map(self._view, images, epochs, keys, decoded))
        pixels = np.zeros((len(views), *self._spec.size, self._spec.in_chans), np.uint8)
        weights = np.ones(len(views), np.float32)
        bad: list[BadSample] = []
        for i, view in enumerate(views):
            if isinstance(view, str):
                weights[i] = 0.0
                bad.append(BadSample(shards[i], keys[i], view))
            else:
                pixels[i] = view
        noise = np.stack([self._noise(e, k) for e, k in zip(epochs, keys, strict=True)])
        return DecodedBatch(
            torch.from_numpy(pixels), torch.from_numpy(noise), torch.from_numpy(weights), bad, rows
        )

    def _view(self, image: bytes, epoch: int, key: str, decoded: bool) -> Pixels | str:
        """The sample's pixels, or why there are none."""
        spec = self._spec
        if decoded:
            return np.frombuffer(image, np.uint8).reshape(*spec.size, spec.in_chans)
        try:
            return training_view(image, epoch, key, spec)
        except CorruptSampleError as error:
            return str(error)

    def _noise(self, epoch: int, key: str) -> npt.NDArray[np.float32]:
        return draw_noise(
            mask_generator(self._spec.seed, epoch, key),
            self._grid_size,
            kind=self._masking.kind,
            mask_ratio=self._masking.mask_ratio,
        )


def decode_block(table: pa.Table, spec: ViewSpec) -> pa.Table:
    """Replace the images of a block by the pixels of their views, for `data.decode: cluster`.

    A broken one stays encoded: the worker meets it, names it and counts it.
    """
    images = table["image"].to_pylist()
    decoded = [False] * len(images)
    for i, (epoch, key) in enumerate(
        zip(table["epoch"].to_pylist(), table["key"].to_pylist(), strict=True)
    ):
        try:
            images[i] = training_view(images[i], epoch, key, spec).tobytes()
        except CorruptSampleError:
            continue
        decoded[i] = True
    columns = {"image": pa.array(images, pa.large_binary()), "decoded": pa.array(decoded)}
    return pa.table(
        [columns.get(name, table[name]) for name in table.schema.names], schema=table.schema
    )


T = TypeVar("T")
U = TypeVar("U")


def ahead(items: Iterable[T], function: Callable[[T], U], depth: int) -> Iterator[U]:
    """`map(function, items)`, computed by one thread up to `depth` results ahead of the reader."""
    iterator = iter(items)
    end = object()

    def compute() -> U | object:
        item = next(iterator, end)
        return end if item is end else function(cast(T, item))

    pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    try:
        pending = deque(pool.submit(compute) for _ in range(depth))
        while (value := pending.popleft().result()) is not end:
            pending.append(pool.submit(compute))
            yield cast(U, value)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)

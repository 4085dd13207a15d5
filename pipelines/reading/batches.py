"""Turn blocks of encoded images into batches on the device, ahead of the training step."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from mae_core.config import MaskingConfig
from mae_core.data.pixels import CorruptSampleError, Pixels
from mae_core.data.transforms import stack_pixels
from mae_core.data.views import ViewSpec, mask_generator, training_views
from mae_core.masking import draw_noise
from pipelines.config.pretrain import PretrainConfig

LEAST_JUDGED = 1000  # least number of samples to which the number of bad ones is compared


def view_spec(config: PretrainConfig) -> ViewSpec:
    return ViewSpec(
        seed=config.seed,
        in_chans=config.model.in_chans,
        size=config.model.img_size,
        crop_scale=config.data.crop_scale,
        flip=config.data.flip,
    )


class BadSample(NamedTuple):
    epoch: int
    shard: str
    key: str
    kind: str  # category for counting: see CorruptSampleError; or checksum, damaged
    reason: str


def too_many_bad(num_bad: int, seen: int, max_bad_ratio: float) -> bool:
    """Return whether too large a share of the samples can't be used.

    The number is compared with at least a thousand samples, so one bad sample among the first ten
    does not count as 10 %.
    """
    return num_bad > max_bad_ratio * max(seen, LEAST_JUDGED)


class DecodedBatch(NamedTuple):
    """One micro batch of one worker. A sample that can't be used is a hole of weight 0.

    The views of a sample are adjacent: B is the number of samples times `crops_per_image`.
    """

    pixels: Tensor  # (B, H, W, C) uint8, or uint16 if any image has 16 bits
    noise: Tensor  # (B, L) float32
    weights: Tensor  # (B,) float32, 0 for a hole
    bad: list[BadSample]
    rows: pa.Table  # the block, without the image column

    @property
    def came(self) -> list[bool]:
        """Whether each sample could be decoded."""
        weights: list[float] = self.weights[:: len(self.weights) // len(self.rows)].tolist()
        return [weight > 0 for weight in weights]


class _Decoding(NamedTuple):
    """A block whose samples the threads are decoding."""

    rows: pa.Table
    samples: list[Future[tuple[list[Pixels] | BadSample, list[npt.NDArray[np.float32]]]]]


class BatchDecoder:
    """Decodes blocks in a pool of threads, which works because decoders release the GIL."""

    def __init__(
        self,
        spec: ViewSpec,
        masking: MaskingConfig,
        grid_size: tuple[int, int],
        num_threads: int,
        num_views: int = 1,
        ratio_at: Callable[[int], float] | None = None,
    ) -> None:
        """Start the threads.

        Args:
            spec: What is cut from an image.
            masking: Its ratio is that of the last step.
            grid_size: Rows and columns of patches.
            num_threads: Images that are decoded at once.
            num_views: Views of each image.
            ratio_at: The share of patches to remove at a position of the run's sequence; by default
                it is the same everywhere.
        """
        self._ratio_at = ratio_at or (lambda position: masking.last_ratio)
        self._spec = spec
        self._num_views = num_views
        self._masking = masking
        self._grid_size = grid_size
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")

    def __call__(self, table: pa.Table) -> DecodedBatch:
        return self._finish(self._start(table))

    def batches(self, tables: Iterable[pa.Table], depth: int) -> Iterator[DecodedBatch]:
        """Yield decoded batches, prepared up to `depth` ahead besides the one being assembled.

        The threads start on a block before the previous one is finished, so that they never wait.
        """
        return ahead(ahead(tables, self._start, depth), self._finish, 1)

    def _start(self, table: pa.Table) -> _Decoding:
        names = ("position", "image", "epoch", "shard", "key", "decoded", "error")
        samples = zip(*(table[name].to_pylist() for name in names), strict=True)
        return _Decoding(
            table.drop_columns(["image"]),
            [self._pool.submit(self._sample, *sample) for sample in samples],
        )

    def _finish(self, decoding: _Decoding) -> DecodedBatch:
        decoded = [sample.result() for sample in decoding.samples]
        num_views, spec = self._num_views, self._spec
        hole = [np.zeros((*spec.size, spec.in_chans), np.uint8)] * num_views
        bad = [views for views, _ in decoded if isinstance(views, BadSample)]
        whole = np.asarray([not isinstance(views, BadSample) for views, _ in decoded], np.float32)
        pixels = stack_pixels(
            [v for views, _ in decoded for v in (hole if isinstance(views, BadSample) else views)]
        )
        noise = np.stack([noise for _, noises in decoded for noise in noises])
        return DecodedBatch(
            torch.from_numpy(pixels),
            torch.from_numpy(noise),
            torch.from_numpy(whole.repeat(num_views)),
            bad,
            decoding.rows,
        )

    def _sample(
        self,
        position: int,
        image: bytes,
        epoch: int,
        shard: str,
        key: str,
        decoded: bool,
        error: str | None,
    ) -> tuple[list[Pixels] | BadSample, list[npt.NDArray[np.float32]]]:
        """Return the sample's views, or why there are none; and each view's masking noise."""
        views = self._views(image, epoch, shard, key, decoded, error)
        ratio = self._ratio_at(position)
        return views, [self._noise(epoch, key, view, ratio) for view in range(self._num_views)]

    def _views(
        self, image: bytes, epoch: int, shard: str, key: str, decoded: bool, error: str | None
    ) -> list[Pixels] | BadSample:
        """Return the sample's views, or why there are none."""
        spec = self._spec
        if error is not None:
            return BadSample(epoch, shard, key, error.partition(":")[0], error)
        if decoded:
            shape = (self._num_views, *spec.size, spec.in_chans)
            return list(np.frombuffer(image, _dtype(image, shape)).reshape(shape))
        try:
            return training_views(image, epoch, key, spec, self._num_views)
        except CorruptSampleError as corrupt:
            return BadSample(epoch, shard, key, corrupt.kind, str(corrupt))

    def _noise(self, epoch: int, key: str, view: int, mask_ratio: float) -> npt.NDArray[np.float32]:
        return draw_noise(
            mask_generator(self._spec.seed, epoch, key, view),
            self._grid_size,
            kind=self._masking.kind,
            mask_ratio=mask_ratio,
            cell=self._masking.cell,
        )


def _dtype(data: bytes, shape: tuple[int, ...]) -> type[np.uint8] | type[np.uint16]:
    return np.uint8 if len(data) == math.prod(shape) else np.uint16


def decode_block(table: pa.Table, spec: ViewSpec, num_views: int = 1) -> pa.Table:
    """Replace a block's images by the pixels of their views, for `data.decode: cluster`.

    A broken image stays encoded, so that the worker finds it, names it and counts it.
    """
    images = table["image"].to_pylist()
    decoded = [False] * len(images)
    for i, (epoch, key) in enumerate(
        zip(table["epoch"].to_pylist(), table["key"].to_pylist(), strict=True)
    ):
        try:
            views = training_views(images[i], epoch, key, spec, num_views)
        except CorruptSampleError:
            continue
        images[i] = b"".join(view.tobytes() for view in views)
        decoded[i] = True
    columns = {"image": pa.array(images, pa.large_binary()), "decoded": pa.array(decoded)}
    return pa.table(
        [columns.get(name, table[name]) for name in table.schema.names], schema=table.schema
    )


def check_place(rows: pa.Table, expected: int, num_rows: int, rank: int) -> None:
    """Raise an error unless data and weights are at one place; samples would be lost."""
    found = int(rows["position"][0].as_py())
    if found != expected or len(rows) != num_rows:
        # Not a DataError: the workers restart, and after a late commit both are at one place.
        raise RuntimeError(
            f"rank {rank} got samples {found} + {len(rows)} of the run's sequence where "
            f"{expected} + {num_rows} were due: a bug, please report it"
        )


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the type to compute in; None means the type of the weights."""
    wanted = precision == "bf16" and device.type == "cuda"
    return torch.bfloat16 if wanted and torch.cuda.is_bf16_supported() else None


T = TypeVar("T")
U = TypeVar("U")


def ahead(items: Iterable[T], function: Callable[[T], U], depth: int) -> Iterator[U]:
    """Compute `map(function, items)` in a thread, up to `depth` results ahead of the reader."""
    iterator = iter(items)

    def compute() -> list[U]:
        return [function(item) for item in islice(iterator, 1)]

    pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    try:
        pending = deque(pool.submit(compute) for _ in range(depth))
        while values := pending.popleft().result():
            pending.append(pool.submit(compute))
            yield from values
    finally:
        pool.shutdown(wait=False, cancel_futures=True)

"""One shard: its images to a tar, its index and a record of it."""

import hashlib
import io
import json
import tarfile
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import ValidationError

from infra import storage
from mae_core.config import StrictConfig
from mae_core.data.decode import decode_image, encode_jpeg
from mae_core.data.image_files import ImageFile
from mae_core.data.manifest import PixelSums, SampleIndex, ShardInfo, index_to_bytes
from mae_core.data.pixels import CorruptSampleError
from mae_core.data.samples import DataError, ShardIndex, index_shard, sample_checksums
from mae_core.data.synthetic import draw_scene, encode_scene
from mae_core.data.transforms import shrink_to_short_side

CATEGORIES_NAME = "categories.json"  # ids and names of the boxes' categories, beside the shards
STATE_FOLDER = ".prepare"  # the plan, and a record of each shard that is done


class Transcode(NamedTuple):
    """Pack smaller JPEGs instead of the images' own bytes."""

    short_side: int
    quality: int


class SceneItem(NamedTuple):
    """One scene to draw and pack."""

    key: str
    seed: int
    scene: int
    size: int

    @property
    def source(self) -> str:
        return self.key

    @property
    def identity(self) -> str:
        return json.dumps(self)


Item = ImageFile | SceneItem


class ShardPlan(NamedTuple):
    name: str  # without an extension
    items: tuple[Item, ...]


class SkippedImage(StrictConfig):
    source: str
    reason: str


class ShardRecord(StrictConfig):
    """What became of a shard; written after it, so that its presence says that it is whole."""

    plan: str
    """Digest of the plan that the shard belongs to."""
    shard: ShardInfo
    skipped: tuple[SkippedImage, ...]
    pixels: PixelSums


def pack_shard(
    shard: ShardPlan, output: str, digest: str, in_chans: int, transcode: Transcode | None
) -> ShardRecord:
    """Write tar, index and record, unless they are there."""
    record_place = storage.join(output, STATE_FOLDER, f"{shard.name}.json")
    old = _finished_record(record_place, output, digest)
    if old is not None:
        return old
    tar_name = f"{shard.name}.tar"
    buffer = io.BytesIO()
    offsets: list[int] = []
    skipped: list[SkippedImage] = []
    sums = PixelSums.none(in_chans)
    with tarfile.open(fileobj=buffer, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        for item in shard.items:
            try:
                parts, counts = _read_item(item, in_chans, transcode)
            except CorruptSampleError as error:
                skipped.append(SkippedImage(source=item.source, reason=str(error)))
                continue
            sums += counts
            offsets.append(tar.offset)
            for extension in sorted(parts):
                member = tarfile.TarInfo(f"{item.key}.{extension}")  # mode 0644, no owner, no time
                member.size = len(parts[extension])
                tar.addfile(member, io.BytesIO(parts[extension]))
        offsets.append(tar.offset)
    data = buffer.getvalue()
    index = index_shard(io.BytesIO(data), tar_name)
    assert index.offsets.tolist() == (offsets if len(offsets) > 1 else [0])
    storage.write_bytes(storage.join(output, tar_name), data)
    record = ShardRecord(
        plan=digest,
        shard=write_index(output, tar_name, data, index),
        skipped=tuple(skipped),
        pixels=sums,
    )
    storage.write_bytes(record_place, json_bytes(record.model_dump(mode="json")))
    return record


def write_index(folder: str, tar_name: str, data: bytes, found: ShardIndex) -> ShardInfo:
    """Write a tar's offsets and checksums beside it.

    Args:
        folder: where the tar lies.
        tar_name: its name there.
        data: all of it.
        found: what `index_shard` says of it.
    """
    index_name = f"{tar_name.removesuffix('.tar')}.index.npy"
    samples = memoryview(data)[int(found.offsets[0]) : int(found.offsets[-1])]
    index = SampleIndex(found.offsets, sample_checksums(samples, found.offsets))
    storage.write_bytes(storage.join(folder, index_name), index_to_bytes(index))
    return ShardInfo(
        path=tar_name,
        index=index_name,
        num_samples=found.num_samples,
        num_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def _finished_record(place: str, output: str, digest: str) -> ShardRecord | None:
    if not storage.exists(place):
        return None
    try:
        record = ShardRecord.model_validate_json(storage.read_bytes(place))
        size = storage.file_size(storage.join(output, record.shard.path))
    except (ValidationError, FileNotFoundError):
        return None
    whole = size == record.shard.num_bytes and storage.exists(
        storage.join(output, record.shard.index)
    )
    return record if whole and record.plan == digest else None


def _read_item(
    item: Item, in_chans: int, transcode: Transcode | None
) -> tuple[dict[str, bytes], PixelSums]:
    """The members of a sample, and the sums over its pixels."""
    if isinstance(item, SceneItem):
        parts = encode_scene(draw_scene(item.seed, item.scene, item.size))
        name = "jpg"
    else:
        parts = _read_files(item)
        name = item.extension
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's about metadata; what matters is an error
        pixels = decode_image(parts[name], in_chans)
    if transcode is not None:
        pixels = shrink_to_short_side(pixels, transcode.short_side)
        if pixels.dtype != np.uint8 or in_chans not in (1, 3):
            raise CorruptSampleError("only 8 bits, grey or colour, fit a JPEG", "unsupported")
        del parts[name]
        parts["jpg"] = encode_jpeg(pixels, transcode.quality)
    return parts, PixelSums.of(pixels)


def _read_files(item: ImageFile) -> dict[str, bytes]:
    wanted = [(item.extension, item.path, item.num_bytes), *item.companions]
    parts = {} if item.label is None else {"cls": str(item.label).encode()}
    if item.boxes is not None:
        parts["json"] = item.boxes
    for extension, path, num_bytes in wanted:
        try:
            parts[extension] = Path(path).read_bytes()
        except OSError as error:
            raise CorruptSampleError(f"cannot be read: {error.strerror}") from error
        if len(parts[extension]) != num_bytes:
            raise DataError(f"{path} changed while it was packed; give the same command again")
    return parts


def json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()

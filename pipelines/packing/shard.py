"""Pack one shard: write its images to a tar, its index, and a record of it."""

import hashlib
import io
import json
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import Field, ValidationError

from infra import storage
from mae_core.config import StrictConfig
from mae_core.data.boxes import holds_boxes, parse_boxes
from mae_core.data.decode import decode_image, encode_jpeg
from mae_core.data.image_files import ImageFile
from mae_core.data.label_maps import check_same_size, decode_indices
from mae_core.data.manifest import PixelSums, SampleIndex, ShardInfo, index_to_bytes
from mae_core.data.pixels import CorruptSampleError, Pixels
from mae_core.data.samples import DataError, ShardIndex, index_shard, sample_checksums
from mae_core.data.synthetic import draw_scene, encode_scene
from mae_core.data.transforms import shrink_to_short_side
from pipelines.outcome import ConfigError

CATEGORIES_NAME = "categories.json"  # ids and names of box categories, beside the shards
MAX_MASK_VALUES = 256  # counted at most; instance maps have many values
STATE_FOLDER = ".prepare"  # holds the plan, and a record of each finished shard


class Transcode(NamedTuple):
    """Pack smaller JPEGs instead of the original files."""

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
    name: str  # without extension
    items: tuple[Item, ...]


class SkippedImage(StrictConfig):
    source: str
    reason: str


class MaskSummary(StrictConfig):
    """A summary of the masks in a shard."""

    num_masks: int = 0
    num_unreadable: int = 0
    """Number of masks that can't be read as class numbers."""
    values: dict[int, int] = Field(default_factory=dict)
    """Maps a value to the number of masks that contain it, for the first values found."""

    def including(self, data: bytes, pixels: Pixels, where: str) -> "MaskSummary":
        """Return the summary with one more mask.

        Raises:
            DataError: The mask and its image differ in size.
        """
        try:
            indices = decode_indices(data, where)
        except DataError:
            return self.model_copy(
                update={
                    "num_masks": self.num_masks + 1,
                    "num_unreadable": self.num_unreadable + 1,
                }
            )
        check_same_size(pixels, indices, where)
        values = dict(self.values)
        for value in np.unique(indices).tolist():
            if value in values or len(values) < MAX_MASK_VALUES:
                values[value] = values.get(value, 0) + 1
        return self.model_copy(update={"num_masks": self.num_masks + 1, "values": values})


def sum_masks(parts: Iterable[MaskSummary]) -> MaskSummary:
    """Merge the summaries of several shards."""
    parts = list(parts)
    values: Counter[int] = Counter()
    for part in parts:
        values.update(part.values)
    return MaskSummary(
        num_masks=sum(part.num_masks for part in parts),
        num_unreadable=sum(part.num_unreadable for part in parts),
        values=dict(values),
    )


class ShardRecord(StrictConfig):
    """The outcome of a shard; written last, so its presence means that the shard is complete."""

    plan: str
    """Digest of the plan to which the shard belongs."""
    shard: ShardInfo
    skipped: tuple[SkippedImage, ...]
    pixels: PixelSums
    sources: tuple[str, ...] = ()
    """For each image of the plan a digest of its files' content; empty if they can't be read.
    Records of an earlier version have none."""
    masks: MaskSummary = MaskSummary()


class PackedShard(NamedTuple):
    record: ShardRecord
    is_new: bool  # False: packed by an earlier run


def pack_shard(
    shard: ShardPlan, output: str, digest: str, in_chans: int, transcode: Transcode | None
) -> PackedShard:
    """Write tar, index and record, unless they exist.

    Raises:
        ConfigError: They exist, and a file that they were packed from has changed.
    """
    record_place = storage.join(output, STATE_FOLDER, f"{shard.name}.json")
    old = _finished_record(record_place, output, digest)
    if old is not None and len(old.sources) == len(shard.items):
        _check_unchanged(shard, old, output)
        return PackedShard(old, is_new=False)
    tar_name = f"{shard.name}.tar"
    packed = _pack_samples(shard, in_chans, transcode)
    index = index_shard(io.BytesIO(packed.data), tar_name)
    assert index.offsets.tolist() == (packed.offsets if len(packed.offsets) > 1 else [0])
    storage.write_bytes(storage.join(output, tar_name), packed.data)
    record = ShardRecord(
        plan=digest,
        shard=write_index(output, tar_name, packed.data, index),
        skipped=tuple(packed.skipped),
        pixels=packed.pixels,
        sources=tuple(packed.sources),
        masks=packed.masks,
    )
    storage.write_bytes(record_place, json_bytes(record.model_dump(mode="json")))
    return PackedShard(record, is_new=True)


def _check_unchanged(shard: ShardPlan, record: ShardRecord, output: str) -> None:
    """Compare the contents of all files with what was packed.

    Raises:
        ConfigError: Names a file that differs.
    """
    pairs = zip(shard.items, record.sources, strict=True)
    changed = [item.source for item, digest in pairs if _source_digest(item) != digest]
    if changed:
        raise ConfigError(
            f"output={output} was packed from other images: in {shard.name}, {len(changed)} of "
            f"{len(shard.items)} images or the files beside them have changed since, such as "
            f"{changed[0]}; choose another output, or replace it with --fresh"
        )


def _source_digest(item: Item) -> str:
    if isinstance(item, SceneItem):
        return ""
    try:
        return _digest(_read_files(item))
    except CorruptSampleError:
        return ""


def _digest(files: dict[str, bytes]) -> str:
    """Return a digest that changes with the content of an image or its companions."""
    hashes = {extension: hashlib.sha256(data).hexdigest() for extension, data in files.items()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:32]


class _Packed(NamedTuple):
    data: bytes  # of the tar
    offsets: list[int]
    skipped: list[SkippedImage]
    sources: list[str]
    pixels: PixelSums
    masks: MaskSummary


def _pack_samples(shard: ShardPlan, in_chans: int, transcode: Transcode | None) -> _Packed:
    buffer = io.BytesIO()
    offsets: list[int] = []
    skipped: list[SkippedImage] = []
    sources: list[str] = []
    sums = PixelSums.none(in_chans)
    masks = MaskSummary()
    with tarfile.open(fileobj=buffer, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        for item in shard.items:
            source = ""
            try:
                parts, image = _read_item(item)
                source = "" if isinstance(item, SceneItem) else _digest(parts)
                pixels = _decode(parts[image], in_chans)
                masks = _check_labels(item, parts, pixels, masks)
                counts = PixelSums.of(_transcode(parts, image, pixels, transcode))
            except CorruptSampleError as error:
                skipped.append(SkippedImage(source=item.source, reason=str(error)))
                continue
            finally:
                sources.append(source)
            sums += counts
            offsets.append(tar.offset)
            for extension in sorted(parts):
                member = tarfile.TarInfo(f"{item.key}.{extension}")  # mode 0644, no owner, no time
                member.size = len(parts[extension])
                tar.addfile(member, io.BytesIO(parts[extension]))
        offsets.append(tar.offset)
    return _Packed(buffer.getvalue(), offsets, skipped, sources, sums, masks)


def write_index(folder: str, tar_name: str, data: bytes, found: ShardIndex) -> ShardInfo:
    """Write a tar's offsets and checksums beside it.

    Args:
        folder: The tar's folder.
        tar_name: The tar's name there.
        data: The whole tar.
        found: The result of `index_shard`.
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


def _read_item(item: Item) -> tuple[dict[str, bytes], str]:
    """Return the members of a sample, and the extension of its image."""
    if isinstance(item, SceneItem):
        return encode_scene(draw_scene(item.seed, item.scene, item.size)), "jpg"
    return _read_files(item), item.extension


def _read_files(item: ImageFile) -> dict[str, bytes]:
    if item.problem is not None:
        raise CorruptSampleError(item.problem)
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
            raise DataError(f"{path} changed while it was packed; run the same command again")
    return parts


def _decode(data: bytes, in_chans: int) -> Pixels:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about metadata; only errors matter here
        return decode_image(data, in_chans)


def _check_labels(
    item: Item, parts: dict[str, bytes], pixels: Pixels, masks: MaskSummary
) -> MaskSummary:
    """Check boxes and mask against the picture; return `masks` including this sample's.

    Raises:
        CorruptSampleError: They belong to another picture.
    """
    if isinstance(item, SceneItem):
        return masks
    try:
        if item.boxes is not None or holds_boxes(parts.get("json")):
            parse_boxes(parts["json"], item.source, None, picture=pixels.shape)
        if "seg.png" in parts:
            return masks.including(parts["seg.png"], pixels, item.source)
    except DataError as error:
        raise CorruptSampleError(str(error).removeprefix(f"{item.source}: ")) from error
    return masks


def _transcode(
    parts: dict[str, bytes], image: str, pixels: Pixels, transcode: Transcode | None
) -> Pixels:
    """Put a smaller JPEG into `parts` if wanted; return the pixels that the image then has."""
    if transcode is None:
        return pixels
    smaller = shrink_to_short_side(pixels, transcode.short_side)
    if smaller.dtype != np.uint8 or smaller.shape[2] not in (1, 3):
        raise CorruptSampleError("only 8 bits, grey or colour, fit a JPEG", "unsupported")
    del parts[image]
    parts["jpg"] = encode_jpeg(smaller, transcode.quality)
    return smaller


def json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()

"""Check the MAE authors' file: it loads, computes what timm computes, and separates classes.

    make check-fair-weights FILE=mae_pretrain_vit_base.pth IMAGENET=/data/imagenet
    python benchmarks/fair_weights.py FILE [IMAGENET [IMAGES]]

FILE may be any file that init_from takes. IMAGENET is a folder with train and val, each with a
folder of images for each class, or with shards (.tar) that have labels (.cls). IMAGES is the
largest number of training images that are used (20,000); a quarter of it is tested. The features
of an untrained encoder are measured beside the file's.
"""

import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from infra import storage
from infra.shard_spec import expand_shards
from mae_core.checkpoint import build_from_weights
from mae_core.checkpoint_manifest import CheckpointRecord
from mae_core.data.decode import decode_image
from mae_core.data.samples import iter_samples
from mae_core.data.transforms import center_crop
from mae_core.data.views import normalize
from mae_core.evaluation.classification import encode_features, knn_accuracy
from mae_core.evaluation.linear_probe import linear_probe_accuracy
from mae_core.interchange.fair import fair_encoder_state_dict
from mae_core.model.encoder import MaskedEncoder
from mae_core.model.family import build_encoder
from pipelines.training.description import describe_weights, read_place
from pipelines.training.init_from import locate
from pipelines.training.weights import Weights

NUM_IMAGES = 20_000
BATCH = 64
TOLERANCE = 1e-4
SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")


class Labelled(NamedTuple):
    image: bytes
    label: str


def main(file: str, imagenet: str | None = None, num_images: int = NUM_IMAGES) -> None:
    place = locate(file, "runs")
    with tempfile.TemporaryDirectory() as workspace:
        weights = read_place(place, Path(workspace))
        for name, value in describe_weights(place, weights).items():
            print(f"{name:>14}  {value}")
        encoder = build_from_weights(weights.state, weights.record).encoder
        difference = difference_from_timm(encoder, weights)
        print(f"features: the largest difference from timm's is {difference:.1e}")
        if difference > TOLERANCE:
            sys.exit(f"FAILED: that is more than {TOLERANCE:.0e}")
        if imagenet is not None:
            measure(encoder, weights.record, imagenet, num_images)
    print("passed")


def difference_from_timm(encoder: MaskedEncoder, weights: Weights) -> float:
    """Return the largest difference of a token from timm's VisionTransformer of these weights."""
    model, shape = weights.record.model, weights.record.model.encoder_shape
    with torch.device("meta"):  # without drawing weights that are replaced at once
        vit = VisionTransformer(
            img_size=model.img_size,
            patch_size=model.patch_size,
            in_chans=model.in_chans,
            embed_dim=shape.embed_dim,
            depth=shape.depth,
            num_heads=shape.num_heads,
            num_classes=0,
            global_pool="token",
        ).eval()
    vit.load_state_dict(fair_encoder_state_dict(encoder), assign=True)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, model.in_chans, *model.img_size, generator=generator)
    with torch.no_grad():
        return float((encoder(images) - vit.forward_features(images)).abs().max())


def measure(
    encoder: MaskedEncoder, record: CheckpointRecord, imagenet: str, num_images: int
) -> None:
    sets = {
        name: list(chosen(storage.join(imagenet, name), limit))
        for name, limit in (("train", num_images), ("val", num_images // 4))
    }
    names = sorted({item.label for items in sets.values() for item in items})
    numbers = {name: number for number, name in enumerate(names)}
    labels = [torch.tensor([numbers[x.label] for x in sets[name]]) for name in ("train", "val")]
    print(f"{len(sets['train'])} training and {len(sets['val'])} test images, {len(names)} classes")
    torch.manual_seed(0)
    untrained = build_encoder(record.model).eval()
    for name, model in (("untrained", untrained), ("the file", encoder)):
        train, test = (features(model, record, sets[part]) for part in ("train", "val"))
        knn = knn_accuracy(train, labels[0], test, labels[1], k=min(20, len(train)))
        probe = linear_probe_accuracy(train, labels[0], test, labels[1], seed=0)
        print(f"{name}: kNN (k=20) {knn:.3f}, linear probe {probe:.3f}", flush=True)


def chosen(place: str, limit: int) -> Iterator[Labelled]:
    """Yield about `limit` labelled images of a set, evenly spread over it."""
    names = storage.list_files(storage.absolute(place))
    if any(name.endswith(".tar") for name in names):
        shards = expand_shards(place)
        for shard in shards:
            with storage.open_stream(shard) as stream:
                for sample in islice(iter_samples(stream, shard), -(-limit // len(shards))):
                    yield Labelled(sample.image, sample.parts["cls"].decode().strip())
        return
    tree = storage.list_tree(storage.absolute(place))
    files = [name for name in sorted(tree) if name.lower().endswith(SUFFIXES) and "/" in name]
    if not files:
        sys.exit(f"{place}: has neither shards nor a folder of images for each class")
    for name in files[:: max(len(files) // limit, 1)]:
        yield Labelled(storage.read_bytes(storage.join(place, name)), name.partition("/")[0])


def features(encoder: MaskedEncoder, record: CheckpointRecord, items: list[Labelled]) -> Tensor:
    found = []
    for start in range(0, len(items), BATCH):
        pixels = np.stack(
            [
                center_crop(decode_image(x.image, record.model.in_chans), record.model.img_size)
                for x in items[start : start + BATCH]
            ]
        )
        images = normalize(pixels, record.channel_mean, record.channel_std)
        found.append(encode_features(encoder, torch.from_numpy(images)))
    return torch.cat(found)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3, 4):
        sys.exit(__doc__)
    main(sys.argv[1], *sys.argv[2:3], *map(int, sys.argv[3:]))

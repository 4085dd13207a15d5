"""Measure before training how many patches of the target are flat.

A flat patch, such as background, contains little except the sensor's noise. `loss.norm_pix` divides
a patch by its standard deviation; `loss.norm_pix_floor` prevents this from turning the noise into
the target.
"""

import logging

import numpy as np
import torch

from mae_core.data.manifest import ChannelStats, Manifest
from mae_core.data.pixels import CorruptSampleError, Pixels
from mae_core.data.transforms import stack_pixels
from mae_core.data.views import normalize, training_view
from mae_core.losses import flat_patch_share
from mae_core.patching import patchify
from pipelines.config.pretrain import PretrainConfig
from pipelines.reading.batches import view_spec
from pipelines.reading.shards import read_rows

logger = logging.getLogger(__name__)

METRIC = "data/flat_patches"
LARGE_SHARE = 0.5

_NUM_PLACES = 16  # number of places in the shards at which images are read
_IMAGES_PER_PLACE = 4


def measure_flat_patches(
    config: PretrainConfig, manifest: Manifest, stats: ChannelStats
) -> dict[str, float]:
    """Measure and log the share of flat patches in views of evenly spread training images.

    Returns:
        The share by the name of its metric; empty if the target is raw pixels.
    """
    floor = config.loss.target_floor
    if floor is None:
        return {}
    views = _views(config, manifest)
    if not views:
        return {}
    images = torch.from_numpy(normalize(stack_pixels(views), stats.mean, stats.std))
    share = flat_patch_share(patchify(images, config.model.patch_size), floor=floor)
    grey_levels = floor**0.5 * float(np.mean(stats.std)) * 255
    logger.info(
        "target: %.0f%% of the patches of %d training views are flat: they deviate by less than "
        "%.1f of 255 grey levels (loss.norm_pix_floor=%g)",
        100 * share,
        len(views),
        grey_levels,
        floor,
    )
    if share > LARGE_SHARE:
        logger.warning(
            "%.0f%% of the patches are flat, so most of the normalised target is near zero and "
            "teaches little. With loss.norm_pix=false the model also learns the brightness of "
            "these patches; a larger model.patch_size leaves fewer of them flat",
            100 * share,
        )
    return {METRIC: share}


def _views(config: PretrainConfig, manifest: Manifest) -> list[Pixels]:
    """Cut a training view of images that are evenly spread over the shards."""
    spec = view_spec(config)
    first_rows = np.cumsum([0, *(shard.num_samples for shard in manifest.shards)])
    step = max(_IMAGES_PER_PLACE, manifest.num_samples // _NUM_PLACES)
    views: list[Pixels] = []
    for place in range(0, manifest.num_samples, step)[:_NUM_PLACES]:
        number = int(np.searchsorted(first_rows, place, side="right")) - 1
        shard, row = manifest.shards[number], place - int(first_rows[number])
        stop = min(row + _IMAGES_PER_PLACE, shard.num_samples)
        for sample in read_rows(shard, row, stop):
            try:
                views.append(training_view(sample.image, 0, sample.key, spec))
            except CorruptSampleError:
                continue
    return views

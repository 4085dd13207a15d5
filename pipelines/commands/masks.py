"""`mae masks preview`: draw what each kind of mask leaves of a picture of yours.

    mae masks preview IMAGE [OUT.png] [--img-size 224] [--patch-size 16] [--mask-ratio 0.75]
                                      [--cell 2] [--draws 3] [--seed 0]

Each column is a value of masking.kind, each row another draw; removed patches are grey. IMAGE is
cropped to a square in its middle. OUT.png is masks.png by default.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pipelines.outcome import ConfigError
from pipelines.terminal import progress

OPTIONS = ("--img-size", "--patch-size", "--mask-ratio", "--cell", "--draws", "--seed", "--debug")


def command(words: Sequence[str]) -> int:
    """Run `mae masks WORDS`; return the exit code."""
    arguments = _parser().parse_args(words)
    _check(arguments)
    with progress.doing("drawing the masks"):
        _draw(arguments)
    sys.stdout.write(f"{arguments.out}\n")
    return 0


def _draw(arguments: argparse.Namespace) -> None:
    # Imported here, because help and mistakes need no image decoders.
    from PIL import Image

    from mae_core.data.decode import decode_image
    from mae_core.data.pixels import CorruptSampleError
    from mae_core.data.samples import DataError
    from mae_core.data.transforms import center_crop
    from mae_core.evaluation.masks_picture import masks_picture

    try:
        pixels = decode_image(Path(arguments.image).read_bytes(), 3)
    except (OSError, CorruptSampleError) as error:
        raise DataError(f"{arguments.image}: {error}") from error
    if pixels.dtype.itemsize > 1:
        pixels = (pixels >> 8).astype("uint8")
    if Path(arguments.out).exists() and Path(arguments.out).samefile(arguments.image):
        raise ConfigError(f"{arguments.out}: this is the picture itself; give another OUT.png")
    picture = masks_picture(
        center_crop(pixels, (arguments.img_size,) * 2),
        patch_size=arguments.patch_size,
        mask_ratio=arguments.mask_ratio,
        cell=arguments.cell,
        seeds=range(arguments.seed, arguments.seed + arguments.draws),
    )
    try:
        Image.fromarray(picture).save(arguments.out, "PNG")
    except OSError as error:
        raise ConfigError(f"{arguments.out}: can't be written: {error.strerror}") from error


def _check(arguments: argparse.Namespace) -> None:
    if arguments.img_size % arguments.patch_size:
        raise ConfigError(
            f"--img-size={arguments.img_size} is not a multiple of "
            f"--patch-size={arguments.patch_size}"
        )
    if not 0 < arguments.mask_ratio < 1:
        raise ConfigError(f"--mask-ratio={arguments.mask_ratio}: give a share between 0 and 1")


def _whole(low: int, high: int) -> Callable[[str], int]:
    """Return a type of argparse's for the whole numbers from `low` to `high`."""

    def parse(word: str) -> int:
        number = int(word)
        if not low <= number <= high:
            raise ValueError(word)
        return number

    parse.__name__ = f"whole number from {low} to {high}"  # argparse shows it in its error
    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mae masks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="preview")
    preview = actions.add_parser("preview", help="draw the masks")
    preview.add_argument("image", metavar="IMAGE", help="a picture: JPEG, PNG, TIFF, DICOM, ...")
    preview.add_argument("out", metavar="OUT.png", nargs="?", default="masks.png")
    preview.add_argument("--img-size", type=_whole(1, 1024), default=224, help="side in pixels")
    preview.add_argument("--patch-size", type=_whole(1, 1024), default=16, help="side in pixels")
    preview.add_argument("--mask-ratio", type=float, default=0.75, help="share that is removed")
    preview.add_argument("--cell", type=_whole(1, 1024), default=2, help="side in patches")
    preview.add_argument("--draws", type=_whole(1, 16), default=3, help="rows of the picture")
    preview.add_argument("--seed", type=_whole(0, 2**31), default=0, help="of the first row")
    preview.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser

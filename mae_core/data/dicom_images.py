"""Decode the first frame of a DICOM file as a viewer shows it.

Grey values are mapped through the file's window, so that higher is brighter; colours become RGB. A
header value that makes no sense, such as a window of zero width, is ignored.

Source: DICOM PS3.3, C.7.6.3 (pixels), C.11.1 (modality) and C.11.2 (window); PS3.5, annex G (RLE).
"""

import math
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.encaps import get_frame
from pydicom.filereader import read_dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi
from pydicom.pixels.utils import pixel_array
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from mae_core.data.decode_limits import WatchedBytes, check_size, hold_memory
from mae_core.data.pixels import CorruptSampleError, Pixels, scale_to_full, to_unsigned

_WAY_OUT = (
    "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg, or gdcmconv --raw writes one "
    "that is read"
)
_PIXELS_AT_A_TIME = 2**20
_WORK_BYTES_PER_PIXEL = 8
# Enhanced CT and MR keep these attributes here, older objects at the top level.
_FUNCTIONAL_GROUPS = {
    "FrameVOILUTSequence": ("WindowCenter", "WindowWidth", "VOILUTFunction"),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept"),
}
_RLE_PADDING_BYTES = 1024
_OFTEN_COMPRESSED_BY = (
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEG2000Lossless,
    RLELossless,
)


class _Window(NamedTuple):
    """The values that are shown as black and as white."""

    low: float
    high: float
    is_sigmoid: bool = False


def missing_syntaxes() -> list[str]:
    """List the common DICOM compressions that this installation can't read."""
    return [
        syntax.name.partition(",")[0]
        for syntax in _OFTEN_COMPRESSED_BY
        if not get_decoder(syntax).is_available
    ]


def decode_dicom(data: bytes) -> Pixels:
    """Decode the first frame to (H, W, 1 or 3) pixels.

    Raises:
        CorruptSampleError: The file exceeds the limits of size or time, or can't be read here.
    """
    if _is_deflated(data):  # pydicom inflates without a limit
        raise CorruptSampleError(
            "is a deflated DICOM, which is not read; gdcmconv --raw writes one that is",
            "unsupported",
        )
    dataset = pydicom.dcmread(WatchedBytes(data))
    samples = int(dataset.get("SamplesPerPixel", 1))
    height, width = int(dataset.Rows), int(dataset.Columns)
    check_size(height, width, samples * max(1, int(dataset.BitsAllocated) // 8))
    hold_memory(height * width * samples * _WORK_BYTES_PER_PIXEL)
    _check_pixels(dataset, samples)
    _use_functional_groups(dataset)
    stored = _stored(dataset)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        return to_unsigned(apply_color_lut(stored, dataset), "DICOM")
    if stored.ndim == 3:
        return scale_to_full(to_unsigned(stored, "DICOM"), int(dataset.BitsStored))
    return _grey(stored, dataset)


def _is_deflated(data: bytes) -> bool:
    """Return whether the file's meta elements name the deflated transfer syntax."""
    source = WatchedBytes(data)
    source.seek(132)  # skips the preamble and the magic
    meta = read_dataset(
        source,
        is_implicit_VR=False,
        is_little_endian=True,
        stop_when=lambda tag, *_: tag >> 16 != 2,
    )
    return str(meta.get("TransferSyntaxUID")) == DeflatedExplicitVRLittleEndian


def _check_pixels(dataset: pydicom.Dataset, samples: int) -> None:
    kind = str(dataset.PhotometricInterpretation)
    known = kind in ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB") or kind.startswith("YBR")
    if not known or (samples == 3) != (kind == "RGB" or kind.startswith("YBR")):
        raise CorruptSampleError(
            f"is a DICOM of {kind} with {samples} samples a pixel", "unsupported"
        )
    if "PixelData" not in dataset:
        raise CorruptSampleError("is a DICOM without pixels in whole numbers", "unsupported")
    if not 1 <= int(dataset.BitsStored) <= 16:
        raise CorruptSampleError(f"is a DICOM of {dataset.BitsStored} bits", "unsupported")


def _use_functional_groups(dataset: pydicom.Dataset) -> None:
    """Move the first frame's window and slope to the top level, where readers look for them."""
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for name, attributes in _FUNCTIONAL_GROUPS.items():
            frames = dataset.get(groups) or [{}]
            of_frame = frames[0].get(name) or [{}]
            for attribute in attributes:
                value = of_frame[0].get(attribute)
                if value is not None:
                    setattr(dataset, attribute, value)


def _stored(dataset: pydicom.Dataset) -> npt.NDArray[Any]:
    """Return the samples of the first frame as they are stored."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax == RLELossless:
        _unpack_rle(dataset)
    elif syntax.is_encapsulated:
        try:
            can_read = get_decoder(syntax).is_available
        except NotImplementedError:
            can_read = False
        if not can_read:
            raise CorruptSampleError(
                f"is a DICOM compressed by {syntax.name}, which this installation can't read: "
                f"{_WAY_OUT}",
                "unsupported",
            )
    return pixel_array(dataset, index=0)


def _unpack_rle(dataset: pydicom.Dataset) -> None:
    """Unpack the first frame's RLE pixels into a buffer of the size that the header claims.

    pydicom would accept whatever size a segment inflates to.
    """
    frame = get_frame(
        dataset.PixelData, 0, number_of_frames=int(dataset.get("NumberOfFrames") or 1)
    )
    num_segments, *offsets = struct.unpack_from("<16I", frame)
    samples, sample_bytes = int(dataset.SamplesPerPixel), int(dataset.BitsAllocated) // 8
    num_pixels = dataset.Rows * dataset.Columns
    if num_segments != samples * sample_bytes:
        raise CorruptSampleError(f"holds {num_segments} RLE segments for {samples} samples")
    bounds = [*offsets[:num_segments], len(frame)]
    planes = np.empty((samples, num_pixels, sample_bytes), np.uint8)
    for i in range(num_segments):
        segment = imagecodecs.packbits_decode(
            frame[bounds[i] : bounds[i + 1]], out=num_pixels + _RLE_PADDING_BYTES
        )
        # The first segment holds the most significant byte; in little-endian pixels it is last.
        planes[i // sample_bytes, :, sample_bytes - 1 - i % sample_bytes] = np.frombuffer(
            segment, np.uint8, num_pixels
        )
    dataset.PixelData = planes.tobytes() + bytes(planes.size % 2)
    dataset["PixelData"].VR = "OB" if sample_bytes == 1 else "OW"
    dataset["PixelData"].is_undefined_length = False
    dataset.PlanarConfiguration = 1
    dataset.NumberOfFrames = 1
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian


def _grey(stored: npt.NDArray[Any], dataset: pydicom.Dataset) -> Pixels:
    """Map stored values to grey, a few rows at a time: floats take four times the memory."""
    show = _shower(dataset)
    inverted = dataset.PhotometricInterpretation == "MONOCHROME1"  # low values are bright
    padding = _padding(dataset, stored.dtype)
    shown = np.empty((*stored.shape, 1), np.uint16)
    rows = max(1, _PIXELS_AT_A_TIME // stored.shape[1])
    for top in range(0, len(stored), rows):
        part = stored[top : top + rows]
        share = np.clip(show(part), 0.0, 1.0)
        if inverted:
            share = 1.0 - share
        if padding is not None:
            share[(part >= padding[0]) & (part <= padding[1])] = 0.0
        shown[top : top + rows, :, 0] = np.rint(share * 65_535)
    return shown


def _shower(dataset: pydicom.Dataset) -> Callable[[npt.NDArray[Any]], npt.NDArray[np.float64]]:
    """Return the function that maps stored values to brightness from 0 to 1."""
    rescale, low, high = _modality(dataset)
    window = _window(dataset, low, high)
    if window is None and dataset.get("VOILUTSequence"):
        bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
        return lambda stored: apply_voi(rescale(stored), dataset) / (2.0**bits - 1)
    black, white, is_sigmoid = window or _Window(low, high)
    if is_sigmoid:
        center, width = (black + white) / 2, white - black
        return lambda stored: 1 / (1 + np.exp(-4 * (rescale(stored) - center) / width))
    return lambda stored: (rescale(stored) - black) / max(white - black, 1e-9)


def _modality(
    dataset: pydicom.Dataset,
) -> tuple[Callable[[npt.NDArray[Any]], npt.NDArray[Any]], float, float]:
    """Return the function from stored to measured values, and the measured minimum and maximum."""
    if dataset.get("ModalityLUTSequence"):
        bits = int(dataset.ModalityLUTSequence[0].LUTDescriptor[2])
        return lambda stored: apply_modality_lut(stored, dataset), 0.0, 2.0**bits - 1
    slope = _numbers(dataset, "RescaleSlope")[:1]
    intercept = _numbers(dataset, "RescaleIntercept")[:1]
    by, plus = (slope or [1.0])[0], (intercept or [0.0])[0]
    if not (math.isfinite(by) and by != 0 and math.isfinite(plus)):
        by, plus = 1.0, 0.0
    bits, is_signed = int(dataset.BitsStored), int(dataset.get("PixelRepresentation", 0)) == 1
    ends = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if is_signed else (0, 2**bits - 1)
    low, high = sorted(end * by + plus for end in ends)
    return lambda stored: stored * np.float64(by) + plus, low, high


def _window(dataset: pydicom.Dataset, low: float, high: float) -> _Window | None:
    """Choose the first window that has a width and overlaps the range of possible values."""
    pairs = zip(_numbers(dataset, "WindowCenter"), _numbers(dataset, "WindowWidth"), strict=False)
    is_sigmoid = dataset.get("VOILUTFunction") == "SIGMOID"
    for center, width in pairs:
        black, white = center - width / 2, center + width / 2
        if width > 0 and math.inf > white > low and -math.inf < black < high:
            return _Window(black, white, is_sigmoid)
    return None


def _numbers(dataset: pydicom.Dataset, name: str) -> list[float]:
    """Return the values of an attribute; NaN for a value that is not a number."""
    value = dataset.get(name)
    if value is None or value == "":
        return []
    found = []
    for one in value if isinstance(value, pydicom.multival.MultiValue) else [value]:
        try:
            found.append(float(one))
        except (TypeError, ValueError):
            found.append(math.nan)
    return found


def _padding(dataset: pydicom.Dataset, kind: np.dtype[Any]) -> tuple[int, int] | None:
    """Return the smallest and largest padding value; such pixels are shown black."""
    ends: list[Any] = [
        dataset.get(name, dataset.get("PixelPaddingValue"))
        for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")
    ]
    if not all(isinstance(end, int) for end in ends):
        return None
    # Some writers store a signed value as unsigned.
    bits = 8 * kind.itemsize
    wrapped = [
        end - 2**bits if kind.kind == "i" and end >= 2 ** (bits - 1) else end for end in ends
    ]
    return min(wrapped), max(wrapped)

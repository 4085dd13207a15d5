"""DICOM is decoded as a viewer shows it, even if header values make no sense."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
import pytest

from mae_core.data.decode import decode_image
from mae_core.data.pixels import CorruptSampleError
from mae_core.data.samples import iter_samples


def make_dicom(
    values: npt.NDArray[Any], syntax: str = pydicom.uid.ExplicitVRLittleEndian, **tags: Any
) -> bytes:
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.Rows, dataset.Columns = values.shape
    dataset.SamplesPerPixel = 1
    dataset.BitsAllocated = 16
    dataset.PixelRepresentation = int(values.dtype == np.int16)
    dataset.BitsStored, dataset.HighBit = 12, 11
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.PixelData = values.tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    if "PixelData" in tags and pydicom.uid.UID(syntax).is_encapsulated:
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True
    buffer = io.BytesIO()
    dataset.preamble = b"\0" * 128
    pydicom.dcmwrite(buffer, dataset)
    return buffer.getvalue()


def test_dicom_is_seen_through_its_window() -> None:
    # Hounsfield = stored - 1024; the window shows -160 to 240.
    stored = np.asarray([[0, 864, 1064, 1264, 4000]], np.uint16)
    window = {"WindowCenter": 40, "WindowWidth": 400}
    rescale = {"RescaleSlope": 1, "RescaleIntercept": -1024}
    shown = decode_image(make_dicom(stored, **window, **rescale), 1)[0, :, 0]
    assert shown.tolist() == [0, 0, 32_768, 65_535, 65_535]
    inverted = make_dicom(stored, **window, **rescale, PhotometricInterpretation="MONOCHROME1")
    assert decode_image(inverted, 1)[0, :, 0].tolist() == [65_535, 65_535, 32_768, 0, 0]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (np.asarray([[0, 4095]], np.uint16), [0, 65_535]),
        (np.asarray([[-2048, 2047]], np.int16), [0, 65_535]),
    ],
)
def test_dicom_without_a_window_spans_its_stored_bits(
    values: npt.NDArray[Any], shown: list[int]
) -> None:
    assert decode_image(make_dicom(values), 1)[0, :, 0].tolist() == shown


def test_a_dicom_that_claims_gigapixels_is_a_bomb() -> None:
    data = make_dicom(np.zeros((2, 2), np.uint16), Rows=30_000, Columns=30_000)
    with pytest.raises(CorruptSampleError, match="claims 30000 x 30000") as error:
        decode_image(data, 1)
    assert error.value.kind == "bomb"


def test_a_dicom_with_a_palette_is_seen_in_its_colours() -> None:
    descriptor = [256, 0, 16]
    tags: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for i, name in enumerate(["Red", "Green", "Blue"]):
        table = np.zeros(256, np.uint16)
        table[7] = 65_535 if i == 1 else 0
        tags[f"{name}PaletteColorLookupTableDescriptor"] = descriptor
        tags[f"{name}PaletteColorLookupTableData"] = table.tobytes()
    shown = decode_image(make_dicom(np.asarray([[0, 7]], np.uint16), **tags), 3)
    assert shown.tolist() == [[[0, 0, 0], [0, 65_535, 0]]]


MEANT = {"WindowCenter": 2000, "WindowWidth": 1000}
RAMP = np.linspace(0, 4000, 100).reshape(10, 10).astype(np.uint16)


def functional_groups(**tags: Any) -> pydicom.Sequence:
    window, slope, frame = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    for name, value in tags.items():
        setattr(window if name.startswith("Window") else slope, name, value)
    frame.FrameVOILUTSequence = pydicom.Sequence([window])
    frame.PixelValueTransformationSequence = pydicom.Sequence([slope])
    return pydicom.Sequence([frame])


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
@pytest.mark.parametrize(
    ("center", "width"),
    [(0, 0), (2000, 0), (2000, -400), (99_999, 10), (-500, 100), (2000, "nan"), ("inf", 1)],
)
def test_a_window_that_can_not_be_meant_counts_as_none(center: object, width: object) -> None:
    shown = decode_image(make_dicom(RAMP, WindowCenter=center, WindowWidth=width), 1)
    np.testing.assert_array_equal(shown, decode_image(make_dicom(RAMP), 1))


@pytest.mark.parametrize(
    "tags",
    [
        {"WindowCenter": [0, 2000], "WindowWidth": [0, 1000]},
        {
            "PerFrameFunctionalGroupsSequence": functional_groups(
                WindowCenter=2000, WindowWidth=1000
            )
        },
        {"SharedFunctionalGroupsSequence": functional_groups(WindowCenter=2000, WindowWidth=1000)},
        {
            "PerFrameFunctionalGroupsSequence": functional_groups(
                WindowCenter=-2000, WindowWidth=2000, RescaleSlope=2, RescaleIntercept=-6000
            )
        },
    ],
)
def test_the_first_window_that_can_be_meant_is_found(tags: dict[str, Any]) -> None:
    stored = np.asarray([[0, 1500, 2000, 2500, 4000]], np.uint16)
    shown = decode_image(make_dicom(stored, **tags), 1)[0, :, 0]
    assert shown.tolist() == [0, 0, 32_768, 65_535, 65_535]


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
@pytest.mark.parametrize(
    ("slope", "shown"),
    [(1, [0, 65_535]), (0, [0, 65_535]), ("nan", [0, 65_535]), (-1, [65_535, 0])],
)
def test_a_slope_of_nothing_counts_as_none(slope: object, shown: list[int]) -> None:
    stored = np.asarray([[0, 4095]], np.uint16)
    data = make_dicom(stored, RescaleSlope=slope, RescaleIntercept=0)
    assert decode_image(data, 1)[0, :, 0].tolist() == shown


def test_padding_is_black_in_either_direction() -> None:
    stored = np.asarray([[-2000, 0, 2000]], np.int16)
    tags = {"PixelPaddingValue": -2000, "WindowCenter": 0, "WindowWidth": 4000}
    for kind, shown in (("MONOCHROME2", [0, 32_768, 65_535]), ("MONOCHROME1", [0, 32_768, 0])):
        data = make_dicom(stored, PhotometricInterpretation=kind, **tags)
        assert decode_image(data, 1)[0, :, 0].tolist() == shown


def test_run_lengths_of_dicom_are_read_within_bounds() -> None:
    plane = [b"\x01" + bytes([0, 15]), b"\x01" + bytes([0, 255])]  # high bytes, low bytes
    for high, low, kind in ((*plane, None), (b"\x81\0" * 10**5, plane[1], "bomb")):
        offsets = struct.pack("<16I", 2, 64, 64 + len(high), *[0] * 13)
        frame = pydicom.encaps.encapsulate([offsets + high + low])
        data = make_dicom(np.zeros((1, 2), np.uint16), pydicom.uid.RLELossless, PixelData=frame)
        if kind is None:
            assert decode_image(data, 1)[0, :, 0].tolist() == [0, 65_535]
        else:
            with pytest.raises(CorruptSampleError) as error:
                decode_image(data, 1)
            assert error.value.kind == kind


@pytest.mark.parametrize(
    "syntax", ["JPEGLSLossless", "JPEGLosslessSV1", "MPEG2MPML", "DeflatedExplicitVRLittleEndian"]
)
def test_a_dicom_in_a_compression_that_is_not_read_is_unsupported(syntax: str) -> None:
    frame = pydicom.encaps.encapsulate([bytes(100)])
    if syntax.startswith("Deflated"):
        frame = bytes(200)
    data = make_dicom(RAMP, getattr(pydicom.uid, syntax), PixelData=frame)
    with pytest.raises(CorruptSampleError, match="gdcmconv --raw") as error:
        decode_image(data, 1)
    assert error.value.kind == "unsupported"


@pytest.mark.realdata
def test_real_dicoms_are_the_pictures_beside_them(real_data: Path) -> None:
    """The .png holds the stored values, so both rise and fall together."""
    with (real_data / "med16_dicom/sample-000000.tar").open("rb") as stream:
        samples = list(iter_samples(stream, "sample-000000.tar"))
    both = [s for s in samples if "dcm" in s.parts]
    assert len(both) == 10
    refused: list[tuple[str, str]] = []
    for sample in both:
        stored = decode_image(sample.parts["png"], 1).astype(float).ravel()
        try:
            shown = decode_image(sample.parts["dcm"], 1).astype(float).ravel()
        except CorruptSampleError as error:
            refused.append((sample.key, str(error)))
            continue
        if len(shown) == len(stored):
            correlation = np.corrcoef(stored, shown)[0, 1]
            assert abs(correlation) > 0.5, sample.key
    # Compressed in ways that need a decoder of their own.
    assert len(refused) <= 3, refused

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mae_core.evaluation.retrieval import cosine_similarity, retrieval_picture


def test_similarity_is_the_cosine() -> None:
    features = np.asarray([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0], [-1.0, 0.0], [0.0, 0.0]])
    found = cosine_similarity(features, np.asarray([5.0, 0.0]))
    np.testing.assert_allclose(found, [1.0, 0.0, 0.5**0.5, -1.0, 0.0], atol=1e-6)
    assert found.dtype == np.float32


@given(
    arrays(np.float64, (4, 3), elements=st.floats(0.1, 10)),
    st.floats(0.1, 100),
)
def test_lengths_do_not_change_who_is_nearest(features: np.ndarray, factor: float) -> None:
    query = np.asarray([1.0, 2.0, 3.0])
    plain = cosine_similarity(features, query)
    np.testing.assert_allclose(cosine_similarity(features * factor, query), plain, atol=1e-5)
    np.testing.assert_allclose(cosine_similarity(features, query * factor), plain, atol=1e-5)


def has_colour(picture: np.ndarray) -> bool:
    spread = picture.max(axis=2).astype(int) - picture.min(axis=2)
    return bool((spread > 60).mean() > 0.005)


def test_the_picture_shows_colours_and_grows_by_rows() -> None:
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    grey = np.full((8, 8, 1), 30_000, np.uint16)
    one_row = retrieval_picture(grey, [grey] * 5, list("abcde"), "like it")
    two_rows = retrieval_picture(red, [grey] * 6, list("abcdef"), "like it")
    assert one_row.ndim == 3
    assert one_row.shape[2] == 3
    assert one_row.dtype == np.uint8
    assert two_rows.shape[0] > one_row.shape[0]
    assert has_colour(two_rows)
    assert not has_colour(one_row)


def test_16_bits_are_shown_on_their_full_scale() -> None:
    dark = retrieval_picture(np.full((8, 8, 1), 100, np.uint16), [], [], "")
    bright = retrieval_picture(np.full((8, 8, 1), 65_535, np.uint16), [], [], "")
    assert (dark < 10).mean() > (bright < 10).mean() + 0.02  # 100 of 65,535 is black


def test_each_found_image_needs_a_caption() -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="shorter"):
        retrieval_picture(pixels, [pixels, pixels], ["one"], "")

import pytest
import torch

from mae_core.patching import patchify, take_patches, unpatchify


# Parity P2.
@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
@pytest.mark.parametrize("channels", [1, 3, 4, 13])
def test_unpatchify_inverts_patchify(channels: int, size: tuple[int, int]) -> None:
    images = torch.randn(2, channels, *size)
    patches = patchify(images, patch_size=8)
    assert patches.shape == (2, size[0] * size[1] // 64, 64 * channels)
    assert torch.equal(unpatchify(patches, (size[0] // 8, size[1] // 8), 8), images)


def test_values_of_a_patch_run_row_column_channel() -> None:
    images = torch.arange(3 * 32 * 48, dtype=torch.float32).reshape(1, 3, 32, 48)
    patches = patchify(images, patch_size=16)
    # Patch 4 is the second of the second row; 101 = (row 2 * 16 + column 1) * 3 + channel 2.
    assert patches[0, 4, 101] == images[0, 2, 16 + 2, 16 + 1]


def test_first_patch_is_the_top_left_corner() -> None:
    images = torch.arange(2 * 4 * 4, dtype=torch.float32).reshape(1, 2, 4, 4)
    assert patchify(images, patch_size=2)[0, 0].tolist() == [0, 16, 1, 17, 4, 20, 5, 21]


def test_taken_patches_are_those_of_the_ids_in_their_order() -> None:
    images = torch.randn(2, 3, 16, 24)
    taken = take_patches(images, 8, torch.tensor([[4, 0], [1, 5]]))
    patches = patchify(images, 8)
    assert torch.equal(taken, torch.stack([patches[0, [4, 0]], patches[1, [1, 5]]]))


def test_rejects_an_image_that_patches_do_not_tile() -> None:
    with pytest.raises(ValueError, match="30x32 is not a multiple of patch_size=16"):
        patchify(torch.zeros(1, 3, 30, 32), patch_size=16)

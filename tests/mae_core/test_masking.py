"""Masking: what the encoder sees, and that nothing is lost on the way back."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_core.masking import (
    MaskKind,
    draw_noise,
    mask_from_noise,
    num_patches_kept,
)

# As drawn when this was written: a resumed run must draw the same.
RANDOM_SEED_0 = ["###.#.", "...###", "######", "#####."]
BLOCK_SEED_0 = ["..##....", "..##....", "...#####", "...#####", "...#####", "...#####"]


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.rand(4, 49, generator=torch.Generator().manual_seed(0))


def make_mask(
    grid_size: tuple[int, int], kind: MaskKind, mask_ratio: float, seed: int, cell: int = 2
) -> npt.NDArray:
    """Return the mask on its grid, as the model makes it from the drawn noise."""
    generator = np.random.default_rng(seed)
    noise = draw_noise(generator, grid_size, kind=kind, mask_ratio=mask_ratio, cell=cell)
    mask = mask_from_noise(torch.from_numpy(noise)[None], mask_ratio).mask[0]
    return mask.reshape(grid_size).numpy()


def picture(mask: npt.NDArray) -> list[str]:
    return ["".join("#" if removed else "." for removed in row) for row in mask]


# Parity P8: the reference's int(L * (1 - ratio)), floating point and all.
@pytest.mark.parametrize(
    ("num_patches", "mask_ratio", "num_kept"),
    [
        *[(196, 0.1, 176), (196, 0.2, 156), (196, 0.3, 137), (196, 0.4, 117), (196, 0.5, 98)],
        *[(196, 0.6, 78), (196, 0.7, 58), (196, 0.75, 49), (196, 0.8, 39), (196, 0.9, 19)],
        *[(256, 0.1, 230), (256, 0.2, 204), (256, 0.3, 179), (256, 0.4, 153), (256, 0.5, 128)],
        *[(256, 0.6, 102), (256, 0.7, 76), (256, 0.75, 64), (256, 0.8, 51), (256, 0.9, 25)],
        *[(100, 0.9, 9), (10, 0.8, 1)],  # 9.99... and 1.99...
        *[(196, 0.999, 1), (49, 0.0, 49)],
    ],
)
def test_num_patches_kept_rounds_as_the_reference(
    num_patches: int, mask_ratio: float, num_kept: int
) -> None:
    assert num_patches_kept(num_patches, mask_ratio) == num_kept


@pytest.mark.parametrize(("mask_ratio", "num_kept"), [(0.0, 49), (0.5, 24), (0.75, 12), (0.999, 1)])
def test_every_image_keeps_the_same_number(
    noise: torch.Tensor, mask_ratio: float, num_kept: int
) -> None:
    patch_mask = mask_from_noise(noise, mask_ratio)
    assert patch_mask.ids_keep.shape == (4, num_kept)
    assert (~patch_mask.mask).sum(dim=1).tolist() == [num_kept] * 4


@settings(max_examples=50)
@given(
    batch_size=st.integers(1, 3),
    num_patches=st.integers(1, 60),
    mask_ratio=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**31),
)
def test_kept_and_removed_are_a_partition_by_noise(
    batch_size: int, num_patches: int, mask_ratio: float, seed: int
) -> None:
    noise = torch.rand(batch_size, num_patches, generator=torch.Generator().manual_seed(seed))
    ids_keep, ids_removed, mask = mask_from_noise(noise, mask_ratio)
    for image in range(batch_size):
        kept = sorted(ids_keep[image].tolist())
        removed = mask[image].nonzero().flatten().tolist()
        assert sorted(kept + removed) == list(range(num_patches))
        assert sorted(ids_removed[image].tolist()) == removed
        assert not removed or noise[image, kept].max() <= noise[image, removed].min()


def test_equal_noise_keeps_the_first_patches() -> None:
    assert mask_from_noise(torch.zeros(1, 64), 0.75).ids_keep.tolist() == [list(range(16))]


@settings(max_examples=100)
@given(
    grid_size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    mask_ratio=st.floats(0.01, 0.99),
    kind=st.sampled_from(["random", "block", "inverse_block", "uniform", "cell"]),
    seed=st.integers(0, 2**31),
)
def test_noise_ranks_an_exact_number_to_removal_on_any_grid(
    grid_size: tuple[int, int], mask_ratio: float, kind: MaskKind, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    noise = draw_noise(generator, grid_size, kind=kind, mask_ratio=mask_ratio, cell=3)
    num_patches = grid_size[0] * grid_size[1]
    assert noise.shape == (num_patches,)
    assert noise.dtype == np.float32
    assert noise.min() >= 0
    num_kept = max(1, int(num_patches * (1 - mask_ratio)))
    assert (~make_mask(grid_size, kind, mask_ratio, seed)).sum() == num_kept
    if kind in (
        "block",
        "inverse_block",
    ):  # the blocks themselves have the number, not only the ranking
        assert (noise >= 1).sum() == num_patches - num_kept


def test_random_mask_of_a_seed_stays_the_same() -> None:
    assert picture(make_mask((4, 6), "random", 0.75, seed=0)) == RANDOM_SEED_0


def test_block_mask_of_a_seed_stays_the_same() -> None:
    assert picture(make_mask((6, 8), "block", 0.5, seed=0)) == BLOCK_SEED_0


def test_block_masks_are_patchier_than_random_ones() -> None:
    def boundary_share(kind: MaskKind) -> float:
        masks = np.stack([make_mask((14, 14), kind, 0.75, seed) for seed in range(20)])
        return float((masks[:, :, 1:] != masks[:, :, :-1]).mean())

    # Two patches drawn alone differ with a chance of 2 * 0.75 * 0.25 = 0.375.
    assert boundary_share("random") == pytest.approx(0.375, abs=0.03)
    assert boundary_share("block") < 0.2


def test_every_patch_of_a_block_mask_can_be_removed_and_kept() -> None:
    removed = np.mean([make_mask((7, 5), "block", 0.5, seed) for seed in range(200)], axis=0)
    assert removed.min() > 0.1
    assert removed.max() < 0.9


def test_grid_keeps_the_top_left_patch_of_every_two_by_two() -> None:
    expected = [".#.#.#", "######", ".#.#.#", "######"]
    assert picture(make_mask((4, 6), "grid", 0.75, seed=0)) == expected
    assert picture(make_mask((4, 6), "grid", 0.75, seed=1)) == expected


def test_grid_refuses_another_ratio_and_an_odd_grid() -> None:
    generator = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"mask_ratio=0\.6 is not 0\.75"):
        draw_noise(generator, (4, 4), kind="grid", mask_ratio=0.6)
    with pytest.raises(ValueError, match="even number of patches a side, not 4x7"):
        draw_noise(generator, (4, 7), kind="grid", mask_ratio=0.75)


@pytest.mark.parametrize(("mask_ratio", "kept"), [(0.75, 1), (0.5, 2), (0.25, 3)])
def test_uniform_keeps_as_many_patches_of_every_two_by_two(mask_ratio: float, kept: int) -> None:
    visible = np.stack([~make_mask((6, 8), "uniform", mask_ratio, seed) for seed in range(200)])
    squares = visible.reshape(200, 3, 2, 4, 2)
    assert (squares.sum(axis=(2, 4)) == kept).all()
    # Each of the four places equally often: 200 draws have a standard error of 0.031.
    assert np.abs(squares.mean(axis=0) - kept / 4).max() < 0.13


def test_uniform_on_an_odd_grid_and_with_another_ratio_spreads_what_is_left() -> None:
    visible = ~make_mask((5, 7), "uniform", 0.6, seed=0)
    assert visible.sum() == 14
    whole = visible[:4, :6].reshape(2, 2, 3, 2).sum(axis=(1, 3))
    assert whole.min() >= 1
    assert whole.max() <= 2
    kept = np.mean([~make_mask((5, 7), "uniform", 0.75, seed) for seed in range(200)], axis=0)
    assert kept.min() > 0.1


@pytest.mark.parametrize(("grid_size", "cell"), [((8, 8), 4), ((7, 9), 3), ((5, 5), 2)])
def test_cells_are_kept_or_removed_as_a_whole_but_for_one(
    grid_size: tuple[int, int], cell: int
) -> None:
    split, kept = [], []
    for seed in range(100):
        mask = make_mask(grid_size, "cell", 0.75, seed, cell)
        shares = [
            mask[row : row + cell, column : column + cell].mean()
            for row in range(0, grid_size[0], cell)
            for column in range(0, grid_size[1], cell)
        ]
        split.append(sum(0 < share < 1 for share in shares))
        kept.append(np.asarray(shares) < 1)
    assert max(split) <= 1
    assert np.mean(kept, axis=0).min() > 0.05  # every cell can be kept


def test_inverse_block_keeps_one_rectangle_that_may_go_on_at_the_other_edge() -> None:
    visible = np.stack([~make_mask((8, 10), "inverse_block", 0.75, seed) for seed in range(400)])
    for mask in visible:
        rows, columns = mask.any(axis=1).sum(), mask.any(axis=0).sum()
        assert rows * columns - mask.sum() < columns  # only the last row is cut off
        for line in (mask.any(axis=1), mask.any(axis=0)):
            assert (line != np.roll(line, 1)).sum() in (0, 2)  # one run around the edge
    # Every patch is kept equally often: the standard error of a share is 0.022.
    assert np.abs(visible.mean(axis=0) - 0.25).max() < 0.09


@pytest.mark.parametrize("kind", ["random", "block", "inverse_block", "uniform", "cell"])
def test_noise_follows_from_its_generator_alone(kind: MaskKind) -> None:
    assert (make_mask((14, 14), kind, 0.75, 3) == make_mask((14, 14), kind, 0.75, 3)).all()
    assert (make_mask((14, 14), kind, 0.75, 3) != make_mask((14, 14), kind, 0.75, 4)).any()


@pytest.mark.compile
def test_compiles_to_one_graph() -> None:
    compiled = torch.compile(mask_from_noise, backend="eager", fullgraph=True)
    assert compiled(torch.rand(2, 16), 0.75).ids_keep.shape == (2, 4)

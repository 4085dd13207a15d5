"""Named randomness never changes, and no two names share it."""

import subprocess
import sys

import numpy as np
import pytest

from mae_core.data.randomness import named_generator, sample_generator

# The values when this was written. If one changes, every resumed run and every set of
# drawn images changes with it.
GOLDEN = [
    ((0,), [519630, 581812, 522861, 152413]),
    ((0, "shards", 0), [363180, 748732, 659019, 683819]),
    ((0, "shards", 1), [221043, 416555, 101217, 120187]),
    ((1, "shards", 0), [117808, 33637, 840336, 931951]),
    ((123456789, "sample", 3, "dog/0001"), [427113, 716056, 371857, 552393]),
    ((0, "Ä"), [135109, 941516, 818024, 722879]),
]


def draw(*names: int | str) -> list[int]:
    seed, *rest = names
    assert isinstance(seed, int)
    return named_generator(seed, *rest).integers(0, 1_000_000, size=4).tolist()


@pytest.mark.parametrize(("names", "values"), GOLDEN)
def test_values_never_change(names: tuple[int | str, ...], values: list[int]) -> None:
    assert draw(*names) == values


def test_other_draws_never_change() -> None:
    generator = sample_generator(0, 2, "a/b")
    assert generator.random() == 0.2118895826922773
    assert generator.uniform(0.2, 1.0) == 0.7881250645979152
    assert generator.permutation(6).tolist() == [0, 1, 4, 2, 3, 5]


def test_another_process_with_another_hash_seed_draws_the_same() -> None:
    code = (
        "from mae_core.data.randomness import sample_generator as g;"
        "print(g(5, 1, 'key').integers(0, 10**6, size=4).tolist())"
    )
    output = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output.strip() == str(draw(5, "sample", 1, "key"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((0, "a"), (0, "b")),
        ((0, "a"), (1, "a")),
        ((0, 1), (0, "1")),
        ((0, 1, 23), (0, 12, 3)),
        ((0, "ab", "c"), (0, "a", "bc")),
        ((0, "a"), (0, "a", 0)),
        ((0, "a", ""), (0, "a")),
        ((1, 0), (0, 1)),
    ],
)
def test_other_names_draw_other_values(
    one: tuple[int | str, ...], other: tuple[int | str, ...]
) -> None:
    assert draw(*one) != draw(*other)


def test_numpy_numbers_are_numbers() -> None:
    plain = named_generator(3, "window", 9).random()
    assert named_generator(np.int64(3), "window", np.int32(9)).random() == plain  # type: ignore[arg-type]


def test_asking_again_starts_again() -> None:
    first = named_generator(0, "x")
    first.random(100)
    assert named_generator(0, "x").random() != first.random()
    assert named_generator(0, "x").random() == named_generator(0, "x").random()


def test_neighbouring_names_are_independent() -> None:
    """Test that values are uniform over names and uncorrelated between epochs."""
    values = np.asarray(
        [[sample_generator(0, epoch, str(i)).random() for i in range(4000)] for epoch in range(2)]
    )
    # 400 expected in each of ten bins, with a standard deviation of 19.
    counts = np.histogram(values[0], bins=10, range=(0, 1))[0]
    assert abs(counts - 400).max() < 90
    # Standard deviation of a correlation of 4,000 independent pairs: 0.016.
    assert abs(np.corrcoef(values)[0, 1]) < 0.07
    assert abs(np.corrcoef(values[0][:-1], values[0][1:])[0, 1]) < 0.07

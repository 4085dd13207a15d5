"""A share of the labels: the same share of each class, and nested."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_core.data.label_budget import LabelBudget
from mae_core.data.label_subset import stratified_subset

LABELS = [0] * 200 + [1] * 100 + [2] * 3


def test_each_class_gives_its_share_and_one_at_least() -> None:
    chosen = stratified_subset(LABELS, LabelBudget(0.1), seed=0)
    assert Counter(LABELS[i] for i in chosen) == {0: 20, 1: 10, 2: 1}


def test_places_rise_and_none_comes_twice() -> None:
    chosen = stratified_subset(LABELS, LabelBudget(0.5), seed=1).tolist()
    assert chosen == sorted(set(chosen))


def test_a_smaller_share_is_part_of_a_larger_one() -> None:
    small, large = (
        set(stratified_subset(LABELS, LabelBudget(f), seed=2).tolist()) for f in (0.01, 0.1)
    )
    assert small < large


def test_seeds_choose_different_samples_and_the_same_seed_the_same() -> None:
    first, again, other = (
        stratified_subset(LABELS, LabelBudget(0.1), seed=s).tolist() for s in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_all_of_the_labels_are_all_of_the_samples() -> None:
    assert stratified_subset(LABELS, LabelBudget(1.0), seed=7).tolist() == list(range(303))


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1), st.floats(0.01, 0.99))
def test_any_kind_of_class_may_be_spread(labels: list[tuple[int, bool]], fraction: float) -> None:
    chosen = stratified_subset(labels, LabelBudget(fraction), seed=0)
    assert {labels[i] for i in chosen} == set(labels)
    assert np.all(np.diff(chosen) > 0)


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_the_order_of_other_classes_does_not_matter(fraction: float) -> None:
    """Test that the choice within a class depends on its own samples only."""
    alone = stratified_subset(["a"] * 40, LabelBudget(fraction), seed=0)
    beside = stratified_subset(["a"] * 40 + ["b"] * 40, LabelBudget(fraction), seed=0)
    assert [i for i in beside if i < 40] == alone.tolist()


def test_each_class_gives_the_same_number_or_all_that_it_has() -> None:
    chosen = stratified_subset(LABELS, LabelBudget(5, is_share=False), seed=0)
    assert Counter(LABELS[i] for i in chosen) == {0: 5, 1: 5, 2: 3}


def test_fewer_labels_of_each_class_are_part_of_more() -> None:
    one, five = (
        set(stratified_subset(LABELS, LabelBudget(n, is_share=False), seed=2).tolist())
        for n in (1, 5)
    )
    assert one < five

"""Label budgets are written so that files, tables and sentences tell them apart."""

import pytest

from mae_core.data.label_budget import LabelBudget


@pytest.mark.parametrize(
    ("budget", "word", "text", "phrase"),
    [
        (LabelBudget(0.1), "0.1", "10 %", "10 % of labels"),
        (LabelBudget(1.0), "1", "100 %", "100 % of labels"),
        (LabelBudget(1, is_share=False), "1shot", "1 per class", "1 label per class"),
        (LabelBudget(5, is_share=False), "5shot", "5 per class", "5 labels per class"),
    ],
)
def test_a_budget_is_written(budget: LabelBudget, word: str, text: str, phrase: str) -> None:
    assert (str(budget), budget.text, budget.phrase) == (word, text, phrase)


@pytest.mark.parametrize(
    ("budget", "available", "count"),
    [
        (LabelBudget(0.1), 25, 3),  # 2.5 is rounded up
        (LabelBudget(0.01), 7, 1),
        (LabelBudget(1, is_share=False), 7, 1),
        (LabelBudget(9, is_share=False), 7, 7),
    ],
)
def test_a_class_gives_so_many_samples(budget: LabelBudget, available: int, count: int) -> None:
    assert budget.count(available) == count


def test_only_a_share_of_1_is_all() -> None:
    assert LabelBudget(1.0).is_all
    assert not LabelBudget(1, is_share=False).is_all
    assert not LabelBudget(0.5).is_all


def test_budgets_sort_from_few_labels_to_many() -> None:
    assert sorted([LabelBudget(1.0), LabelBudget(0.01)])[0].amount == 0.01
    five, one = LabelBudget(5, is_share=False), LabelBudget(1, is_share=False)
    assert sorted([five, one]) == [one, five]

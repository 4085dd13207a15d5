"""How many labels a model is trained with."""

import math
from typing import NamedTuple


class LabelBudget(NamedTuple):
    """How many labels there are to train on: a share of each class, or a number of each class."""

    amount: float
    is_share: bool = True

    def __str__(self) -> str:
        """Return a word for names of files and metrics, such as `0.1` or `5shot`."""
        return f"{self.amount:g}" if self.is_share else f"{self.amount:g}shot"

    @property
    def text(self) -> str:
        """What people read in tables and pictures, such as `10 %` or `5 per class`."""
        return f"{100 * self.amount:.3g} %" if self.is_share else f"{self.amount:g} per class"

    @property
    def phrase(self) -> str:
        """What people read in a sentence, such as `10 % of labels` or `5 labels per class`."""
        if self.is_share:
            return f"{self.text} of labels"
        return f"{self.amount:g} label{'' if self.amount == 1 else 's'} per class"

    @property
    def is_all(self) -> bool:
        return self.is_share and self.amount == 1

    def count(self, available: int) -> int:
        """Return how many of the samples of a class are used: rounded, and at least one."""
        if not self.is_share:
            return min(int(self.amount), available)
        return max(1, math.floor(self.amount * available + 0.5))

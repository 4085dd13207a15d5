import numpy as np

from mae_core.evaluation.arms_picture import ArmBar, PairedBar, arms_picture


def is_orange(picture: np.ndarray) -> int:
    red, green, blue = (picture[..., i].astype(int) for i in range(3))
    return int(((red > 240) & (abs(green - 127) < 30) & (blue < 60)).sum())


def test_arms_and_their_differences_are_drawn_side_by_side() -> None:
    arms = [ArmBar("finetune", [0.5, 0.6]), ArmBar("scratch", [0.4, 0.45])]
    alone = arms_picture(arms, [], "title", metric="top1")
    pairs = [PairedBar("over scratch", 0.12, 0.02)]
    both = arms_picture(arms, pairs, "title", metric="top1")
    assert alone.dtype == both.dtype == np.uint8
    assert is_orange(alone) == 0
    assert is_orange(both) > 50


def test_error_bars_grow_with_the_standard_error_and_one_seed_has_none() -> None:
    arms = [ArmBar("finetune", [0.5])]
    marks = [
        is_orange(
            arms_picture(
                arms,
                [PairedBar("over scratch", 0.1, error), PairedBar("over untrained", 0.3, 0.05)],
                "title",
                metric="ap",
            )
        )
        for error in (None, 0.02, 0.04)
    ]
    assert marks[0] < marks[1] < marks[2]

"""A plan knows the number of steps of a stage before it runs."""

from collections.abc import Mapping
from typing import Any

import pytest

from pipelines.chain import plan as chain_plan
from pipelines.config.downstream import ClassifyConfig
from pipelines.config.pretrain import PretrainConfig


@pytest.mark.parametrize(
    ("optim", "samples", "steps"),
    [
        ({"epochs": 8, "global_batch_size": 32, "micro_batch_size": 32}, 3000, 750),
        ({"epochs": 8, "global_batch_size": 32, "micro_batch_size": 32, "max_steps": 9}, 3000, 9),
    ],
)
def test_steps_of_pretraining_are_known_beforehand(
    optim: Mapping[str, Any], samples: int, steps: int
) -> None:
    config = PretrainConfig.model_validate({"data": {"train": "x"}, "optim": optim})
    assert chain_plan._num_steps(config, samples) == steps
    assert chain_plan._num_steps(config, None) is None


def test_steps_of_tuning_are_those_of_all_arms() -> None:
    config = ClassifyConfig.model_validate(
        {
            "init_from": "x",
            "data": {"train": "a", "val": "b"},
            "classify": {
                "arms": ["knn", "finetune", "scratch"],
                "label_fraction": [0.1, 1.0],
                "seeds": [0, 1, 2],
            },
            "optim": {"epochs": 2, "global_batch_size": 64},
        }
    )
    # Of 1,000 labels 31 steps, of 100 of them 3; two arms, three seeds.
    assert chain_plan._num_steps(config, 1000) == 2 * 3 * (31 + 3)


def test_steps_of_few_shot_arms_are_not_known_beforehand() -> None:
    config = ClassifyConfig.model_validate(
        {
            "init_from": "x",
            "data": {"train": "a", "val": "b"},
            "classify": {"arms": ["finetune"], "labels_per_class": [5]},
        }
    )
    assert chain_plan._num_steps(config, 1000) is None


def test_steps_of_trials_of_learning_rates_are_counted() -> None:
    config = ClassifyConfig.model_validate(
        {
            "init_from": "x",
            "data": {"train": "a", "val": "b"},
            "classify": {"arms": ["logistic", "linear", "finetune"], "seeds": [0, 1]},
            "optim": {"epochs": 2, "global_batch_size": 64, "base_lr": [1e-3, 2e-3, 4e-3]},
        }
    )
    # 31 steps of linear and of finetune; three rates of finetune, 25 steps on 800 labels each.
    assert chain_plan._num_steps(config, 1000) == 2 * (2 * 31 + 3 * 25)

"""How many steps a run has, and how many of them are its warm-up."""

import pytest

from mae_core.config import OptimConfig
from pipelines.config.steps import needed_steps, num_steps, warmup_steps
from pipelines.outcome import ConfigError


def make_optim(**changes: object) -> OptimConfig:
    fields = {"epochs": 10, "warmup_epochs": 1, "global_batch_size": 16, **changes}
    return OptimConfig.model_validate(fields)


def test_a_run_has_as_many_steps_as_its_epochs_fill() -> None:
    assert num_steps(make_optim(), 100) == 62  # 1,000 samples in batches of 16
    assert num_steps(make_optim(max_steps=7), 100) == 7
    # 0.29 * 100 is a little less than 29 in floating point.
    assert num_steps(make_optim(epochs=0.29, global_batch_size=1), 100) == 29


def test_samples_that_fill_no_batch_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"optim\.epochs=0\.1 of 100 samples is less than one"):
        needed_steps(make_optim(epochs=0.1), 100, "samples")


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps"),
    [
        (10, None, 6.25),  # an epoch of 100 samples
        (4, None, 5.0),  # of 25 steps
        (10, 8, 1.6),  # of 8 steps, where an epoch has not even ended
    ],
)
def test_the_warm_up_takes_a_fifth_of_the_steps_at_most(
    epochs: float, max_steps: int | None, steps: float
) -> None:
    optim = make_optim(epochs=epochs, max_steps=max_steps)
    assert warmup_steps(optim, 100, num_steps(optim, 100)) == steps

"""Compute the number of steps of a run and of its warm-up, for training and for planning."""

from typing import Protocol

from pipelines.outcome import ConfigError


class OptimSteps(Protocol):
    """What determines the number of a run's steps."""

    @property
    def epochs(self) -> float: ...

    @property
    def global_batch_size(self) -> int: ...

    @property
    def max_steps(self) -> int | None: ...


HELD_SHARE = 0.2  # share of the labels on which learning rates are compared


def num_steps(optim: OptimSteps, num_samples: int) -> int:
    """Return the number of optimizer steps of a run on so many samples; 0 if they fill no batch."""
    # `epochs` may have been rounded, which must not cost a step of a whole number.
    steps = int(optim.epochs * num_samples / optim.global_batch_size + 1e-9)
    return min(steps, optim.max_steps or steps)


class WarmupSteps(Protocol):
    """What determines the length of a run's warm-up."""

    @property
    def warmup_epochs(self) -> float: ...

    @property
    def global_batch_size(self) -> int: ...


def warmup_steps(optim: WarmupSteps, num_samples: int, total_steps: int) -> float:
    """Return the number of steps during which the learning rate rises; it may be a fraction.

    The warm-up takes at most a fifth of the steps, so that a run that `max_steps` shortens still
    trains at its full learning rate.
    """
    wanted = optim.warmup_epochs * num_samples / optim.global_batch_size
    return min(wanted, total_steps / 5)


def needed_steps(optim: OptimSteps, num_samples: int, what: str) -> int:
    """Return `num_steps`, which must be at least one; `what` names the samples in the message.

    Raises:
        ConfigError: the samples fill no batch.
    """
    steps = num_steps(optim, num_samples)
    if steps == 0:
        raise ConfigError(
            f"optim.epochs={optim.epochs:g} of {num_samples} {what} is less than one "
            f"optim.global_batch_size={optim.global_batch_size}; lower it, or train longer"
        )
    return steps

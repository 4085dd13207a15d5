"""A loss that is not finite is an error of floating point numbers, for whoever catches those."""

from mae_core.training_error import NonFiniteLossError


def test_a_loss_that_is_not_finite_is_a_floating_point_error() -> None:
    assert issubclass(NonFiniteLossError, FloatingPointError)

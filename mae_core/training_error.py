"""The error that ends a training; it can be named without loading torch."""


class NonFiniteLossError(FloatingPointError):
    """The loss or the gradient is NaN or infinite; the weights are unchanged by the step."""

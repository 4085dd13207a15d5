"""A training in the driver's process leaves torch as it was."""

import torch

from pipelines.config.sections import ScalingConfig
from pipelines.training.torch_state import restored_torch


def test_threads_and_random_state_are_as_they_were() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    num_threads = torch.get_num_threads()
    with restored_torch(ScalingConfig()):
        torch.set_num_threads(num_threads + 1)
        torch.rand(7)
    assert torch.get_num_threads() == num_threads
    assert torch.equal(torch.rand(3), expected)

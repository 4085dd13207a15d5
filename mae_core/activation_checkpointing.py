"""Activation checkpointing: less memory for more computing.

A transformer block keeps its input only, and computes the rest again in the backward pass: Chen et
al. 2016, https://arxiv.org/abs/1604.06174.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def checkpointed_activations(model: nn.Module) -> Iterator[None]:
    """Let the transformer blocks of `model` keep no activations for the backward pass in the block.

    Losses and gradients are the same to the bit, also with stochastic depth. The module tree, its
    names and its state stay what they are.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        # The module's own `forward` goes before that of its class.
        vars(block)["forward"] = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del vars(block)["forward"]

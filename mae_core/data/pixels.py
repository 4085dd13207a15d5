"""What a decoded picture is, and the error that is raised where there is none."""

from typing import Any

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.unsignedinteger[Any]]  # (H, W, C), uint8 or uint16


class CorruptSampleError(ValueError):
    """A sample's image can't be used; names the reason, not the sample.

    `kind` is what such samples are counted by: empty, lfs_pointer, not_an_image, truncated, bomb,
    memory, channels, unsupported, corrupt.
    """

    def __init__(self, message: str, kind: str = "corrupt") -> None:
        super().__init__(message)
        self.kind = kind

"""Layers for batches with several environments."""

from ._batchnorm import (
    EnvironmentBatchNorm1d,
    EnvironmentBatchNorm2d,
    EnvironmentBatchNorm3d,
    convert_batchnorm,
)

__all__ = [
    "EnvironmentBatchNorm1d",
    "EnvironmentBatchNorm2d",
    "EnvironmentBatchNorm3d",
    "convert_batchnorm",
]

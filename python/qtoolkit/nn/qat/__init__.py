"""Layers of a model that is prepared for quantization-aware training."""

from qtoolkit.nn.qat.batch_norm import BatchNorm1d, BatchNorm2d
from qtoolkit.nn.qat.weighted import Conv2d, Linear

__all__ = ["BatchNorm1d", "BatchNorm2d", "Conv2d", "Linear"]

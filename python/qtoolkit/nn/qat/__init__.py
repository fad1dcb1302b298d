"""Layers of a model that is prepared for quantization-aware training."""

from qtoolkit.nn.qat.batch_norm import BatchNorm1d, BatchNorm2d
from qtoolkit.nn.qat.weighted import WEIGHTED, Conv1d, Conv2d, ConvTranspose2d, Linear

__all__ = [
    "WEIGHTED",
    "BatchNorm1d",
    "BatchNorm2d",
    "Conv1d",
    "Conv2d",
    "ConvTranspose2d",
    "Linear",
]

"""Quantized layers: ordinary modules on plain uint8 and int8 tensors."""

from qtoolkit.nn import functional, qat
from qtoolkit.nn.base import QParams, QuantizedModule
from qtoolkit.nn.conv import Conv1d, Conv2d, ConvTranspose2d, DepthwiseConv2d
from qtoolkit.nn.elementwise import Add, BatchNorm2d, Cat, Dequantize, Mul, Quantize, ReLU
from qtoolkit.nn.embedding import Embedding, EmbeddingBag
from qtoolkit.nn.linear import DynamicLinear, Linear
from qtoolkit.nn.lookup import Lookup
from qtoolkit.nn.matmul import Matmul
from qtoolkit.nn.moving import (
    ChannelShuffle,
    Pad,
    PixelShuffle,
    PixelUnshuffle,
    UpsampleNearest2d,
)
from qtoolkit.nn.normalization import LayerNorm, Softmax
from qtoolkit.nn.pooling import (
    AdaptiveAvgPool2d,
    AvgPool2d,
    GlobalAvgPool2d,
    MaxPool2d,
    Mean,
    Sum,
)
from qtoolkit.nn.recurrent import (
    DynamicGRU,
    DynamicGRUCell,
    DynamicLSTM,
    DynamicLSTMCell,
    DynamicRNN,
    DynamicRNNCell,
)
from qtoolkit.nn.upsample import UpsampleBilinear2d
from qtoolkit.nn.weight_only import (
    Float32Layer,
    PackedWeight,
    QuantizedWeightConv2d,
    QuantizedWeightEmbedding,
    QuantizedWeightLinear,
)

__all__ = [
    "AdaptiveAvgPool2d",
    "Add",
    "AvgPool2d",
    "BatchNorm2d",
    "Cat",
    "ChannelShuffle",
    "Conv1d",
    "Conv2d",
    "ConvTranspose2d",
    "DepthwiseConv2d",
    "Dequantize",
    "DynamicGRU",
    "DynamicGRUCell",
    "DynamicLSTM",
    "DynamicLSTMCell",
    "DynamicLinear",
    "DynamicRNN",
    "DynamicRNNCell",
    "Embedding",
    "EmbeddingBag",
    "Float32Layer",
    "GlobalAvgPool2d",
    "LayerNorm",
    "Linear",
    "Lookup",
    "Matmul",
    "MaxPool2d",
    "Mean",
    "Mul",
    "PackedWeight",
    "Pad",
    "PixelShuffle",
    "PixelUnshuffle",
    "QParams",
    "Quantize",
    "QuantizedModule",
    "QuantizedWeightConv2d",
    "QuantizedWeightEmbedding",
    "QuantizedWeightLinear",
    "ReLU",
    "Softmax",
    "Sum",
    "UpsampleBilinear2d",
    "UpsampleNearest2d",
    "functional",
    "qat",
]

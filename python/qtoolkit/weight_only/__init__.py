"""Weights of few bits, for large models: any linear layer, convolution and embedding, untraced."""

from qtoolkit.weight_only.awq import Awq
from qtoolkit.weight_only.checkpoints import read_awq, read_gptq
from qtoolkit.weight_only.folder import load_folder, save_folder
from qtoolkit.weight_only.gptq import Gptq
from qtoolkit.weight_only.hqq import Hqq
from qtoolkit.weight_only.loading import skeleton
from qtoolkit.weight_only.method import (
    Inputs,
    Result,
    WeightMethod,
    make_weight_method,
    register_weight_method,
    weight_methods,
)
from qtoolkit.weight_only.quantize import quantize_weights
from qtoolkit.weight_only.rtn import RoundToNearest

__all__ = [
    "Awq",
    "Gptq",
    "Hqq",
    "Inputs",
    "Result",
    "RoundToNearest",
    "WeightMethod",
    "load_folder",
    "make_weight_method",
    "quantize_weights",
    "read_awq",
    "read_gptq",
    "register_weight_method",
    "save_folder",
    "skeleton",
    "weight_methods",
]

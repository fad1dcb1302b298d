"""The operators, typed: the only user of torch.ops.qtoolkit.

All are functions of plain tensors and work in eager mode, torch.jit.script, torch.export and
torch.compile. Codes are uint8 or int8 tensors with real = scale * (code - zero_point). A scale is a
float32 tensor and a zero point an int32 tensor: of one element per tensor, of shape [channels] per
channel. An output's dtype is int8 where quant_min < 0, else uint8; (quant_min, quant_max) lie in
[-128, 127] or [0, 255].

The integer arithmetic is that of Jacob et al., "Quantization and Training of Neural Networks for
Efficient Integer-Arithmetic-Only Inference" (2018), with the factor between the accumulator and the
output in float32: code = clamp(round_half_even(acc * factor) + zero_point, quant_min, quant_max).

Errors, for all: TypeError for a wrong dtype; ValueError for a shape, device, scale (not positive or
not finite), zero point or range that does not fit. The message names operator and argument.
"""

import qtoolkit._library  # noqa: F401  (registers the operators)
from qtoolkit.ops.fake_quantize import (
    fake_quantize_per_channel,
    fake_quantize_per_group,
    fake_quantize_per_tensor,
    fake_quantize_relu,
    observe_fake_quantize,
)
from qtoolkit.ops.integer import (
    adaptive_avg_pool2d,
    add,
    avg_pool2d,
    batch_norm,
    cat,
    conv2d,
    conv_transpose2d,
    dequantize_per_channel,
    dequantize_per_tensor,
    linear,
    linear_dynamic,
    lookup,
    matmul,
    max_pool2d,
    mul,
    quantize_per_channel,
    quantize_per_tensor,
    requantize,
)
from qtoolkit.ops.learned import fake_quantize_lsq, fake_quantize_pact
from qtoolkit.ops.low_bit import (
    fake_quantize_binary,
    fake_quantize_block_float,
    fake_quantize_float,
    fake_quantize_ternary,
)
from qtoolkit.ops.normalization import layer_norm, softmax
from qtoolkit.ops.plan import load_plan, make_plan, run_plan
from qtoolkit.ops.qdq import qdq_dequantize, qdq_quantize
from qtoolkit.ops.shapes import (
    channel_shuffle,
    mean,
    pad,
    pixel_shuffle,
    pixel_unshuffle,
    sum,
    upsample_bilinear2d,
    upsample_nearest2d,
)
from qtoolkit.ops.statistics import (
    histogram,
    histogram_min_max,
    min_max,
    min_max_per_channel,
    min_max_per_group,
    range_kl,
    range_l2,
    range_mse,
    range_mse_per_channel,
    rebin_histogram,
)
from qtoolkit.ops.training import batch_norm_act, conv2d_train, max_pool2d_train
from qtoolkit.ops.weight_only import (
    dequantize_codes,
    embedding_weight_only,
    linear_weight_only,
    pack_codes,
    unpack_codes,
)

__all__ = [
    "adaptive_avg_pool2d",
    "add",
    "avg_pool2d",
    "batch_norm",
    "batch_norm_act",
    "cat",
    "channel_shuffle",
    "conv2d",
    "conv2d_train",
    "conv_transpose2d",
    "dequantize_codes",
    "dequantize_per_channel",
    "dequantize_per_tensor",
    "embedding_weight_only",
    "fake_quantize_binary",
    "fake_quantize_block_float",
    "fake_quantize_float",
    "fake_quantize_lsq",
    "fake_quantize_pact",
    "fake_quantize_per_channel",
    "fake_quantize_per_group",
    "fake_quantize_per_tensor",
    "fake_quantize_relu",
    "fake_quantize_ternary",
    "histogram",
    "histogram_min_max",
    "layer_norm",
    "linear",
    "linear_dynamic",
    "linear_weight_only",
    "load_plan",
    "lookup",
    "make_plan",
    "matmul",
    "max_pool2d",
    "max_pool2d_train",
    "mean",
    "min_max",
    "min_max_per_channel",
    "min_max_per_group",
    "mul",
    "observe_fake_quantize",
    "pack_codes",
    "pad",
    "pixel_shuffle",
    "pixel_unshuffle",
    "qdq_dequantize",
    "qdq_quantize",
    "quantize_per_channel",
    "quantize_per_tensor",
    "range_kl",
    "range_l2",
    "range_mse",
    "range_mse_per_channel",
    "rebin_histogram",
    "requantize",
    "run_plan",
    "softmax",
    "sum",
    "unpack_codes",
    "upsample_bilinear2d",
    "upsample_nearest2d",
]

"""Bad arguments get an error that names operator and argument; nothing crashes."""

import math
import re

import pytest
import torch
from op_reference import random_codes, scale, zero_point
from test_ops_conv2d import make_case
from test_ops_conv_transpose2d import make_case as make_transposed_case
from test_ops_linear import make_case as make_linear_case

from qtoolkit import ops

U8 = random_codes((2, 3, 6, 6))
F32 = torch.zeros(2, 3, 6, 6)
S, Z = scale(0.1), zero_point(3)
S3, Z3 = torch.full((3,), 0.1), torch.zeros(3, dtype=torch.int32)
META = torch.zeros(2, 3, 6, 6, device="meta")

PER_TENSOR = {"x": F32, "scale": S, "zero_point": Z, "quant_min": 0, "quant_max": 255}
PER_CHANNEL = {**PER_TENSOR, "scale": S3, "zero_point": Z3, "ch_axis": 1}
E2M1 = {"mantissa_bits": 1, "min_exponent": 0, "max_value": 6.0}
LSQ = {
    "x": F32,
    "scale": torch.tensor([0.1]),
    "zero_point": None,
    "ch_axis": None,
    "quant_min": -8,
    "quant_max": 7,
}
ADD = {
    "a": U8,
    "a_scale": S,
    "a_zero_point": Z,
    "b": U8,
    "b_scale": S,
    "b_zero_point": Z,
    "y_scale": S,
    "y_zero_point": Z,
    "quant_min": 0,
    "quant_max": 255,
}
REQUANTIZE = {
    "x": U8,
    "x_scale": S,
    "x_zero_point": Z,
    "y_scale": S,
    "y_zero_point": Z,
    "quant_min": 0,
    "quant_max": 255,
}
MAX_POOL = {
    "x": U8,
    "kernel_size": [3, 3],
    "stride": [2, 2],
    "padding": [1, 1],
    "dilation": [1, 1],
}
AVG_POOL = {
    **REQUANTIZE,
    "kernel_size": [3, 3],
    "stride": [2, 2],
    "padding": [1, 1],
    "ceil_mode": False,
    "count_include_pad": True,
    "divisor_override": None,
}
CAT = {
    "xs": [U8, U8],
    "scales": [S, S],
    "zero_points": [Z, Z],
    "dim": 1,
    "y_scale": S,
    "y_zero_point": Z,
    "quant_min": 0,
    "quant_max": 255,
}
GOOD = {
    "quantize_per_tensor": PER_TENSOR,
    "fake_quantize_per_tensor": PER_TENSOR,
    "quantize_per_channel": PER_CHANNEL,
    "fake_quantize_per_channel": PER_CHANNEL,
    "dequantize_per_tensor": {"x": U8, "scale": S, "zero_point": Z},
    "dequantize_per_channel": {"x": U8, "scale": S3, "zero_point": Z3, "ch_axis": 1},
    "fake_quantize_ternary": {"x": F32, "scale": S, "threshold": S},
    "fake_quantize_binary": {"x": F32, "scale": S3, "ch_axis": 1},
    "fake_quantize_float": {"x": F32, "scale": S, "ch_axis": None, **E2M1},
    "fake_quantize_block_float": {
        "x": F32,
        "tensor_scale": None,
        "block_size": 16,
        **E2M1,
        "scale_format": "e4m3",
    },
    "fake_quantize_lsq": LSQ,
    "fake_quantize_pact": {"x": F32, "alpha": torch.tensor([6.0]), "quant_max": 15},
    "min_max": {"x": F32},
    "min_max_per_channel": {"x": F32, "ch_axis": 1},
    "histogram": {"x": F32, "bins": 4, "lower": 0.0, "upper": 1.0},
    "softmax": {**REQUANTIZE, "dim": 1},
    "layer_norm": {
        **REQUANTIZE,
        "normalized_shape": [6],
        "weight": torch.ones(6),
        "bias": None,
        "eps": 1e-5,
    },
    "conv2d": make_case("3x3"),
    "conv_transpose2d": make_transposed_case("3x3 of stride 2"),
    "linear": make_linear_case(),
    "matmul": {
        "a": U8,
        "a_scale": S,
        "a_zero_point": Z,
        "b": random_codes((2, 3, 6, 4)),
        "b_scale": S,
        "b_zero_point": Z,
        "y_scale": S,
        "y_zero_point": Z,
        "quant_min": 0,
        "quant_max": 255,
    },
    "linear_dynamic": {
        "x": F32,
        "weight": random_codes((4, 6), torch.int8),
        "weight_scale": torch.ones(4),
        "bias": torch.ones(4),
    },
    "add": ADD,
    "mul": ADD,
    "requantize": REQUANTIZE,
    "lookup": {"x": U8, "table": random_codes((256,))},
    "batch_norm": {**REQUANTIZE, "weight": torch.ones(3), "bias": torch.ones(3)},
    "max_pool2d": MAX_POOL,
    "avg_pool2d": AVG_POOL,
    "adaptive_avg_pool2d": {**REQUANTIZE, "output_size": [2, 2]},
    "pad": {"x": U8, "x_scale": S, "x_zero_point": Z, "pad": [1, 1], "mode": "constant"},
    "upsample_nearest2d": {"x": U8, "size": [9, 9], "scale_factors": None},
    "upsample_bilinear2d": {
        **REQUANTIZE,
        "size": [9, 9],
        "scale_factors": None,
        "align_corners": False,
    },
    "channel_shuffle": {"x": U8, "groups": 3},
    "pixel_shuffle": {"x": U8.reshape(2, 12, 3, 3), "factor": 2},
    "pixel_unshuffle": {"x": U8, "factor": 2},
    "mean": {**REQUANTIZE, "dim": [1], "keepdim": False},
    "sum": {**REQUANTIZE, "dim": [1], "keepdim": False},
    "cat": CAT,
}

# operator, what changes, the error's type, a part of its message
BAD = [
    ("quantize_per_tensor", {"x": F32.double()}, TypeError, "x must be float32"),
    ("quantize_per_tensor", {"x": U8}, TypeError, "got uint8 [2, 3, 6, 6]"),
    ("quantize_per_tensor", {"scale": S3}, ValueError, "must hold one element"),
    ("quantize_per_tensor", {"scale": scale(0.1).double()}, TypeError, "scale must be float32"),
    ("quantize_per_tensor", {"zero_point": Z.long()}, TypeError, "zero_point must be int32"),
    ("quantize_per_tensor", {"scale": scale(0.0)}, ValueError, "scale must be positive"),
    ("quantize_per_tensor", {"scale": scale(-1.0)}, ValueError, "scale must be positive"),
    ("quantize_per_tensor", {"scale": scale(math.nan)}, ValueError, "got nan"),
    ("quantize_per_tensor", {"scale": scale(math.inf)}, ValueError, "got inf"),
    ("quantize_per_tensor", {"zero_point": zero_point(256)}, ValueError, "lie in [0, 255]"),
    ("quantize_per_tensor", {"zero_point": zero_point(-1)}, ValueError, "got -1"),
    ("quantize_per_tensor", {"quant_min": -1}, ValueError, "[-128, 127] or [0, 255]"),
    ("quantize_per_tensor", {"quant_max": 256}, ValueError, "got quant_min 0 and quant_max 256"),
    ("quantize_per_tensor", {"quant_min": 9, "quant_max": 9}, ValueError, "quant_min < quant_max"),
    ("quantize_per_tensor", {"scale": S.to("meta")}, ValueError, "move them to one device"),
    ("quantize_per_channel", {"ch_axis": 4}, ValueError, "ch_axis must lie in [-4, 3]"),
    ("quantize_per_channel", {"ch_axis": -5}, ValueError, "ch_axis must lie in [-4, 3]"),
    ("quantize_per_channel", {"ch_axis": 0}, ValueError, "each of 2 channels, got [3]"),
    ("quantize_per_channel", {"scale": S}, ValueError, "one element for each of 3 channels"),
    (
        "quantize_per_channel",
        {"scale": torch.tensor([1, 0, 1.0])},
        ValueError,
        "scale must be positive",
    ),
    ("quantize_per_channel", {"zero_point": Z3 - 1}, ValueError, "zero_point must lie in"),
    ("fake_quantize_per_tensor", {"x": F32.double()}, TypeError, "convert it with .float()"),
    ("fake_quantize_per_tensor", {"scale": -0.5}, ValueError, "scale must be positive"),
    ("fake_quantize_per_tensor", {"zero_point": 300}, ValueError, "lie in [0, 255], got 300"),
    ("fake_quantize_per_channel", {"x": F32[0, 0, 0, 0]}, ValueError, "x has no dimensions"),
    ("fake_quantize_ternary", {"x": U8}, TypeError, "x must be float32"),
    ("fake_quantize_ternary", {"scale": -S}, ValueError, "scale must be finite and not negative"),
    ("fake_quantize_ternary", {"threshold": S / 0}, ValueError, "threshold must be finite"),
    ("fake_quantize_ternary", {"threshold": S3}, ValueError, "threshold must hold one element"),
    ("fake_quantize_ternary", {"ch_axis": 1}, ValueError, "one element for each of 3 channels"),
    ("fake_quantize_binary", {"clip": -1.0}, ValueError, "clip must not be negative"),
    ("fake_quantize_binary", {"clip": math.nan}, ValueError, "clip must not be negative"),
    ("fake_quantize_binary", {"scale": S3.double()}, TypeError, "scale must be float32"),
    ("fake_quantize_binary", {"ch_axis": 4}, ValueError, "ch_axis must lie in [-4, 3]"),
    ("fake_quantize_float", {"x": F32.double()}, TypeError, "x must be float32"),
    ("fake_quantize_float", {"scale": S * 0}, ValueError, "scale must be positive"),
    ("fake_quantize_float", {"mantissa_bits": 0}, ValueError, "mantissa_bits must lie in [1, 22]"),
    ("fake_quantize_float", {"min_exponent": -127}, ValueError, "must lie in [-126, 64]"),
    ("fake_quantize_float", {"max_value": 5.0}, ValueError, "must be a number of the format"),
    ("fake_quantize_float", {"max_value": 0.5}, ValueError, "must be a number of the format"),
    ("fake_quantize_float", {"max_value": math.inf}, ValueError, "must be a number of the format"),
    ("fake_quantize_block_float", {"x": U8}, TypeError, "x must be float32"),
    ("fake_quantize_block_float", {"x": F32[0, 0, 0, 0]}, ValueError, "so no blocks"),
    ("fake_quantize_block_float", {"block_size": 0}, ValueError, "must lie in [1, 1024]"),
    ("fake_quantize_block_float", {"scale_format": "e5m2"}, ValueError, "e8m0 or e4m3, got e5m2"),
    ("fake_quantize_block_float", {"tensor_scale": S * 0}, ValueError, "must be positive"),
    ("fake_quantize_block_float", {"tensor_scale": S3}, ValueError, "must hold one element"),
    (
        "fake_quantize_block_float",
        {"tensor_scale": S, "scale_format": "e8m0"},
        ValueError,
        "a tensor_scale is for scale_format e4m3",
    ),
    (
        "fake_quantize_block_float",
        {"min_exponent": -2, "max_value": 0.5},
        ValueError,
        "max_value must be at least 1",
    ),
    ("fake_quantize_lsq", {"x": F32.double()}, TypeError, "x must be float32"),
    ("fake_quantize_lsq", {"scale": S3}, ValueError, "scale must hold one element, got [3]"),
    ("fake_quantize_lsq", {"scale": S.double()}, TypeError, "scale must be float32"),
    ("fake_quantize_lsq", {"scale": S * math.nan}, ValueError, "got nan; training diverged"),
    ("fake_quantize_lsq", {"scale": S.to("meta")}, ValueError, "move them to one device"),
    ("fake_quantize_lsq", {"ch_axis": 1}, ValueError, "scale must hold one element for each of 3"),
    ("fake_quantize_lsq", {"ch_axis": 4, "scale": S3}, ValueError, "ch_axis must lie in [-4, 3]"),
    ("fake_quantize_lsq", {"zero_point": Z}, TypeError, "zero_point must be float32"),
    ("fake_quantize_lsq", {"zero_point": S3}, ValueError, "zero_point must hold one element"),
    ("fake_quantize_lsq", {"zero_point": S / 0}, ValueError, "zero_point must be finite, got inf"),
    ("fake_quantize_lsq", {"quant_min": 1}, ValueError, "the codes must include 0"),
    ("fake_quantize_lsq", {"quant_max": 200}, ValueError, "[-128, 127] or [0, 255]"),
    ("fake_quantize_lsq", {"grad_scale": math.inf}, ValueError, "grad_scale must be finite"),
    ("fake_quantize_pact", {"x": U8}, TypeError, "x must be float32"),
    ("fake_quantize_pact", {"alpha": S3}, ValueError, "alpha must hold one element"),
    ("fake_quantize_pact", {"alpha": S / 0}, ValueError, "alpha must be finite"),
    ("fake_quantize_pact", {"quant_max": 0}, ValueError, "quant_min < quant_max"),
    ("dequantize_per_tensor", {"x": F32}, TypeError, "x must hold uint8 or int8 codes"),
    ("dequantize_per_tensor", {"x": U8.int()}, TypeError, "got int32"),
    ("dequantize_per_tensor", {"zero_point": zero_point(-4)}, ValueError, "lie in [0, 255]"),
    ("dequantize_per_channel", {"ch_axis": 2}, ValueError, "each of 6 channels"),
    ("min_max", {"x": torch.zeros(0, 3)}, ValueError, "x is empty"),
    ("min_max", {"x": U8}, TypeError, "x must be float32"),
    ("min_max_per_channel", {"x": torch.zeros(3, 0)}, ValueError, "x is empty"),
    ("min_max_per_channel", {"ch_axis": 4}, ValueError, "ch_axis"),
    ("histogram", {"x": torch.zeros(0)}, ValueError, "x is empty"),
    ("histogram", {"bins": 0}, ValueError, "bins must lie in"),
    ("histogram", {"lower": 1.0}, ValueError, "lower < upper"),
    ("histogram", {"upper": math.nan}, ValueError, "finite"),
    ("histogram", {"upper": 1e300}, ValueError, "finite"),
    ("histogram", {"upper": 1e-45}, ValueError, "a range that bins can divide"),
    ("conv2d", {"x": torch.zeros(2, 16, 9, 9)}, TypeError, "quantize it with quantize_per_tensor"),
    ("conv2d", {"x": U8[0]}, ValueError, "x must have 4 dimensions"),
    ("conv2d", {"x": U8}, ValueError, "do not fit x uint8 [2, 3, 6, 6]"),
    ("conv2d", {"x": random_codes((2, 16, 0, 9))}, ValueError, "only the batch of x may be empty"),
    ("conv2d", {"weight": torch.zeros(32, 16, 3, 3)}, TypeError, "weight must be int8"),
    (
        "conv2d",
        {"weight": torch.zeros(32, 16, 3, dtype=torch.int8)},
        ValueError,
        "weight must have 4",
    ),
    (
        "conv2d",
        {"weight": torch.zeros(0, 16, 3, 3, dtype=torch.int8)},
        ValueError,
        "no output channels",
    ),
    ("conv2d", {"weight_scale": S3}, ValueError, "each of 32 output channels"),
    ("conv2d", {"weight_scale": torch.zeros(32)}, ValueError, "weight_scale must be positive"),
    ("conv2d", {"bias": torch.zeros(32)}, TypeError, "bias must be int32"),
    ("conv2d", {"bias": Z3}, ValueError, "bias must hold one element for each of 32"),
    ("conv2d", {"groups": 0}, ValueError, "groups 0"),
    ("conv2d", {"groups": 5}, ValueError, "groups 5"),
    ("conv2d", {"stride": [0, 1]}, ValueError, "stride must be two numbers in [1"),
    ("conv2d", {"stride": [1, 1, 1]}, ValueError, "stride must be two numbers"),
    ("conv2d", {"padding": [-1, 0]}, ValueError, "padding must be two numbers in [0"),
    ("conv2d", {"padding": [2**40, 0]}, ValueError, "padding must be two numbers"),
    ("conv2d", {"padding": [2**31 - 1] * 2, "stride": [2**30] * 2}, ValueError, "too large"),
    ("conv2d", {"padding": [2**20] * 2, "stride": [2**20] * 2}, ValueError, "check the padding"),
    (
        "conv2d",
        {"bias": torch.tensor([0] * 7 + [2**31 - 1] + [0] * 24).int()},
        ValueError,
        "2147483647 of output channel 7",
    ),
    ("conv2d", {"dilation": [0, 1]}, ValueError, "dilation must be two numbers"),
    ("conv2d", {"dilation": [6, 1]}, ValueError, "larger than the padded input's 11"),
    ("conv2d", {"y_scale": None}, ValueError, "give both y_scale and y_zero_point"),
    ("conv2d", {"y_zero_point": zero_point(999)}, ValueError, "y_zero_point must lie in [0, 255]"),
    ("conv2d", {"x_zero_point": zero_point(-1)}, ValueError, "x_zero_point must lie in [0, 255]"),
    ("conv2d", {"x_scale": scale(math.inf)}, ValueError, "x_scale must be positive"),
    ("conv2d", {"quant_max": 999}, ValueError, "quant_max 999"),
    ("conv2d", {"residual": U8}, ValueError, "residual needs residual_scale"),
    (
        "conv2d",
        {"residual": U8, "residual_scale": S, "residual_zero_point": Z},
        ValueError,
        "residual must have the output's shape [2, 32, 9, 9]",
    ),
    (
        "conv2d",
        {"residual": U8, "y_scale": None, "y_zero_point": None},
        ValueError,
        "a residual needs an output of codes",
    ),
    ("softmax", {"dim": 4}, ValueError, "dim must lie in [-4, 3] for x uint8 [2, 3, 6, 6], got 4"),
    ("softmax", {"x": F32}, TypeError, "x must hold uint8 or int8 codes"),
    ("softmax", {"y_scale": None}, ValueError, "give both y_scale and y_zero_point"),
    ("layer_norm", {"normalized_shape": [5]}, ValueError, "must be that of the last dimensions"),
    ("layer_norm", {"normalized_shape": []}, ValueError, "must be that of the last dimensions"),
    ("layer_norm", {"x": U8[..., :0]}, ValueError, "must be that of the last dimensions"),
    ("layer_norm", {"weight": S3}, ValueError, "weight must be of normalized_shape [6]"),
    ("layer_norm", {"bias": torch.zeros(6).double()}, TypeError, "bias must be float32"),
    ("layer_norm", {"eps": -1.0}, ValueError, "eps must not be negative, got -1"),
    (
        "layer_norm",
        {"weight": torch.full((6,), math.inf)},
        ValueError,
        "weight / y_scale must be finite",
    ),
    ("conv_transpose2d", {"x": F32}, TypeError, "x must hold uint8 or int8 codes"),
    ("conv_transpose2d", {"groups": 3}, ValueError, "groups 3 do not fit x"),
    ("conv_transpose2d", {"x": U8}, ValueError, "do not fit x uint8 [2, 3, 6, 6]"),
    ("conv_transpose2d", {"output_padding": [2, 0]}, ValueError, "smaller than stride or dilation"),
    ("conv_transpose2d", {"padding": [9, 0]}, ValueError, "the output's height would be -2"),
    ("conv_transpose2d", {"stride": [0, 1]}, ValueError, "stride"),
    ("conv_transpose2d", {"weight_scale": S3}, ValueError, "one for each of 40 output channels"),
    ("conv_transpose2d", {"y_scale": None}, ValueError, "give both y_scale and y_zero_point"),
    (
        "conv_transpose2d",
        {"dilation": [1 << 29, 1], "padding": [1 << 29, 1]},
        ValueError,
        "border included, is too large; check kernel and dilation",
    ),
    ("linear", {"x": random_codes((5, 63))}, ValueError, "last dimension of x uint8 [5, 63]"),
    ("linear", {"x": random_codes(())}, ValueError, "last dimension"),
    (
        "linear",
        {"weight": torch.zeros(2, 3, 4, dtype=torch.int8)},
        ValueError,
        "weight must have 2 dimensions",
    ),
    (
        "linear",
        {"x": random_codes((1, 70_000)), "weight": torch.ones(40, 70_000, dtype=torch.int8)},
        ValueError,
        "could overflow the int32 accumulator",
    ),
    ("linear_dynamic", {"x": F32.double()}, TypeError, "x must be float32, float16 or bfloat16"),
    ("linear_dynamic", {"x": F32[..., :5]}, ValueError, "last dimension of x float32 [2, 3, 6, 5]"),
    ("linear_dynamic", {"x": torch.tensor(1.0)}, ValueError, "last dimension of x float32 []"),
    ("linear_dynamic", {"weight": torch.ones(4, 6)}, TypeError, "weight must be int8"),
    ("linear_dynamic", {"weight": U8.to(torch.int8)}, ValueError, "weight must have 2 dimensions"),
    ("linear_dynamic", {"weight_scale": S3}, ValueError, "one for each of 4 output channels"),
    ("linear_dynamic", {"weight_scale": S / 0}, ValueError, "weight_scale must be positive"),
    ("linear_dynamic", {"bias": torch.ones(4).int()}, TypeError, "bias must be float32"),
    ("linear_dynamic", {"bias": torch.ones(3)}, ValueError, "each of 4 output channels, got float"),
    ("linear_dynamic", {"bias": META[0, 0, 0]}, ValueError, "move them to one device"),
    ("linear_dynamic", {"activation": "tanh"}, ValueError, 'activation must be "none", "relu"'),
    (
        "linear_dynamic",
        {"x": torch.ones(1, 70_000), "weight": torch.ones(4, 70_000, dtype=torch.int8)},
        ValueError,
        "could overflow the int32 accumulator",
    ),
    ("matmul", {"a": F32}, TypeError, "a must hold uint8 or int8 codes"),
    ("matmul", {"b": F32}, TypeError, "b must hold uint8 or int8 codes"),
    ("matmul", {"b": U8[0, 0, :5]}, ValueError, "must be [..., M, K] and [..., K, N]"),
    ("matmul", {"b": U8[0, 0, 0]}, ValueError, "b uint8 [6] must be [..., M, K]"),
    ("matmul", {"a": U8[:, :2]}, ValueError, "do not broadcast to one"),
    ("matmul", {"a": U8[..., :0], "b": U8[..., :0, :]}, ValueError, "sums of 0 products"),
    (
        "matmul",
        {"a": random_codes((1, 33026)), "b": random_codes((33026, 1))},
        ValueError,
        "sums of 33026 products do not fit: K must lie in [1, 33025]",
    ),
    ("matmul", {"b": META.to(torch.uint8)}, ValueError, "move them to one device"),
    ("matmul", {"y_scale": None}, ValueError, "give both y_scale and y_zero_point"),
    ("matmul", {"b_zero_point": zero_point(-1)}, ValueError, "b_zero_point must lie in [0, 255]"),
    ("matmul", {"a_scale": scale(1e30), "y_scale": scale(1e-30)}, ValueError, "overflows float32"),
    ("add", {"b": F32}, TypeError, "b must hold uint8 or int8 codes"),
    ("add", {"b": U8[:, :2]}, ValueError, "do not broadcast"),
    ("add", {"b": META.to(torch.uint8)}, ValueError, "move them to one device"),
    ("add", {"a_scale": scale(1e30), "y_scale": scale(1e-30)}, ValueError, "overflows float32"),
    ("add", {"b_zero_point": zero_point(-1)}, ValueError, "b_zero_point"),
    ("mul", {"a": F32}, TypeError, "a must hold uint8 or int8 codes"),
    ("mul", {"b": U8[:, :2]}, ValueError, "do not broadcast"),
    ("mul", {"a_scale": scale(1e30), "y_scale": scale(1e-30)}, ValueError, "a_scale * b_scale"),
    ("mul", {"y_zero_point": zero_point(-1)}, ValueError, "y_zero_point"),
    ("requantize", {"x": F32}, TypeError, "x must hold uint8 or int8 codes"),
    ("requantize", {"y_scale": scale(0.0)}, ValueError, "y_scale must be positive"),
    ("lookup", {"x": F32}, TypeError, "x must hold uint8 or int8 codes"),
    ("lookup", {"table": torch.zeros(256)}, TypeError, "table must hold uint8 or int8 codes"),
    ("lookup", {"table": random_codes((255,))}, ValueError, "one element for each of 256 codes"),
    ("lookup", {"table": META.to(torch.uint8)}, ValueError, "move them to one device"),
    ("batch_norm", {"x": U8[0]}, ValueError, "[N, C] or [N, C, H, W]"),
    ("batch_norm", {"weight": torch.ones(4)}, ValueError, "weight must hold one element for each"),
    ("batch_norm", {"bias": torch.full((3,), math.nan)}, ValueError, "must be finite"),
    ("batch_norm", {"bias": torch.full((3,), 1e38), "y_scale": S * 0.1}, ValueError, "bias / y_sc"),
    ("batch_norm", {"weight": torch.full((3,), 3e38), "x_scale": S * 100}, ValueError, "* weight"),
    ("max_pool2d", {"x": F32}, TypeError, "x must hold uint8 or int8 codes"),
    ("max_pool2d", {"x": U8[0]}, ValueError, "x must have 4 dimensions"),
    ("max_pool2d", {"kernel_size": [9, 9]}, ValueError, "larger than the padded input's 8"),
    ("max_pool2d", {"kernel_size": [0, 1]}, ValueError, "kernel_size must be two numbers in [1"),
    ("max_pool2d", {"stride": [0, 1]}, ValueError, "stride must be two numbers in [1"),
    ("max_pool2d", {"padding": [2, 2]}, ValueError, "at most half the kernel"),
    ("max_pool2d", {"padding": [-1, 0]}, ValueError, "padding must be two numbers"),
    ("avg_pool2d", {"divisor_override": 0}, ValueError, "divisor_override must be positive"),
    ("avg_pool2d", {"kernel_size": [9, 9]}, ValueError, "larger than the padded input's 8"),
    ("avg_pool2d", {"x": U8[:, :, :0]}, ValueError, "only the batch of x may be empty"),
    ("adaptive_avg_pool2d", {"output_size": [0, 1]}, ValueError, "output_size"),
    ("adaptive_avg_pool2d", {"x": U8[:, :, :0]}, ValueError, "only the batch of x may be empty"),
    ("pad", {"mode": "mirror"}, ValueError, 'or "circular", got "mirror"'),
    ("pad", {"pad": [1]}, ValueError, "two numbers for each padded dimension"),
    ("pad", {"pad": [0] * 10}, ValueError, "two numbers for each padded dimension"),
    ("pad", {"pad": [6, 0, 0, 0], "mode": "reflect"}, ValueError, "too much for a dimension of 6"),
    ("pad", {"pad": [7, 0], "mode": "circular"}, ValueError, "too much for a dimension of 6"),
    ("pad", {"pad": [0] * 6, "mode": "replicate"}, ValueError, "only the last two dimensions"),
    ("pad", {"pad": [-4, -2]}, ValueError, "leaves nothing of x"),
    ("upsample_nearest2d", {"size": None}, ValueError, "give either size or scale_factors"),
    ("upsample_nearest2d", {"scale_factors": [2.0, 2.0]}, ValueError, "give either size or"),
    ("upsample_nearest2d", {"size": [9]}, ValueError, "must hold two numbers"),
    ("upsample_nearest2d", {"size": [0, 9]}, ValueError, "the output would be empty"),
    ("upsample_nearest2d", {"x": U8[0]}, ValueError, "x must have 4 dimensions"),
    ("upsample_nearest2d", {"x": U8[:, :, :0]}, ValueError, "only the batch of x may be empty"),
    (
        "upsample_bilinear2d",
        {"size": None, "scale_factors": [0.1, 1.0]},
        ValueError,
        "the output would be empty",
    ),
    (
        "upsample_bilinear2d",
        {"size": None, "scale_factors": [math.nan, 1.0]},
        ValueError,
        "scale_factors must be positive and finite, got nan",
    ),
    ("channel_shuffle", {"groups": 2}, ValueError, "groups 2 must divide the channels of x"),
    ("channel_shuffle", {"groups": 0}, ValueError, "groups must lie in [1, 32768], got 0"),
    ("pixel_shuffle", {"factor": 3}, ValueError, "factor 3 squared must divide the channels"),
    ("pixel_shuffle", {"factor": -2}, ValueError, "factor must lie in [1, 32768], got -2"),
    ("pixel_unshuffle", {"factor": 4}, ValueError, "factor 4 must divide height and width"),
    ("mean", {"dim": []}, ValueError, "dim names no dimension"),
    ("mean", {"dim": [4]}, ValueError, "dim must hold different numbers in [-4, 3], got [4]"),
    ("mean", {"dim": [1, -3]}, ValueError, "dim must hold different numbers"),
    ("sum", {"x": U8[:, :0]}, ValueError, "a dimension that is summed must not be empty"),
    ("cat", {"xs": [], "scales": [], "zero_points": []}, ValueError, "xs is empty"),
    ("cat", {"scales": [S]}, ValueError, "must be of one length, got 2, 1 and 2"),
    ("cat", {"scales": [S], "zero_points": [Z]}, ValueError, "one element for each of 2 inputs"),
    ("cat", {"dim": 4}, ValueError, "dim must lie in [-4, 3]"),
    ("cat", {"xs": [U8, U8[:, :, :3]]}, ValueError, "must agree in all dimensions but 1"),
    ("cat", {"xs": [U8, U8[0]]}, ValueError, "must agree in all dimensions but 1"),
    ("cat", {"xs": [U8, F32]}, TypeError, "xs must hold uint8 or int8 codes"),
    ("cat", {"zero_points": [Z, zero_point(-1)]}, ValueError, "zero_point must lie in [0, 255]"),
]


@pytest.mark.parametrize("operator", GOOD)
def test_the_unchanged_arguments_work(operator):
    getattr(ops, operator)(**GOOD[operator])


@pytest.mark.parametrize(
    ("operator", "change", "error", "message"),
    BAD,
    ids=[f"{operator}-{'-'.join(change)}-{i}" for i, (operator, change, *_) in enumerate(BAD)],
)
def test_bad_arguments_are_named(operator, change, error, message):
    with pytest.raises(error, match=re.escape(message)) as caught:
        getattr(ops, operator)(**{**GOOD[operator], **change})
    assert f"qtoolkit::{operator}" in str(caught.value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:Sparse CSR tensor")
@pytest.mark.parametrize("operator", GOOD)
def test_sparse_and_nested_tensors_are_refused(operator):
    first = next(iter(GOOD[operator]))
    value = GOOD[operator][first]
    x = value[0] if operator == "cat" else value
    nested = torch.nested.nested_tensor([x[0].float(), x[0].float()])
    for bad in (x.to_sparse(), x[0, 0].to_sparse_csr() if x.dim() > 2 else x.to_sparse(), nested):
        change = {first: [bad, bad] if operator == "cat" else bad}
        with pytest.raises(TypeError, match=rf"qtoolkit::{operator}: .* takes dense tensors"):
            getattr(ops, operator)(**{**GOOD[operator], **change})


def test_an_unknown_kernel_path_lists_the_known():
    from qtoolkit import _C

    with pytest.raises(ValueError, match="reference, portable, neondot, avx2"):
        _C.force_path("sse9")
    with pytest.raises(ValueError, match="conv2d"):
        _C.kernel_paths("conv9d")


def test_a_missing_library_says_how_to_build_it(tmp_path, monkeypatch):
    from qtoolkit import _library

    monkeypatch.setattr(_library, "_FOLDER", tmp_path)
    with pytest.raises(ImportError, match="pip install --no-build-isolation"):
        _library.load()
    (tmp_path / "libqtoolkit_ops.so").write_bytes(b"not a library")
    with pytest.raises(ImportError, match="does not load with PyTorch"):
        _library.load()

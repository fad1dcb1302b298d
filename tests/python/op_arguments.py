"""Arguments that every operator takes, from which tests change one."""

import torch
from op_reference import random_codes, scale, zero_point
from test_ops_conv2d import make_case
from test_ops_conv_transpose2d import make_case as make_transposed_case
from test_ops_linear import make_case as make_linear_case

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
HISTOGRAM = {
    "counts": torch.arange(40),
    "min_val": torch.tensor(-1.0),
    "max_val": torch.tensor(3.0),
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
    "min_max_per_group": {"x": F32, "group_size": 2, "axis": 1},
    "histogram_min_max": {"x": F32, "bins": 4, "lower": 0.0, "upper": 1.0},
    "rebin_histogram": {
        "counts": torch.arange(40),
        "old_lower": 0.0,
        "old_upper": 1.0,
        "lower": -1.0,
        "upper": 2.0,
    },
    "range_l2": {**HISTOGRAM, "levels": 16},
    "range_kl": {**HISTOGRAM, "levels": 16},
    "range_mse": {**HISTOGRAM, "quant_min": 0, "quant_max": 15, "symmetric": False},
    "range_mse_per_channel": {
        "x": F32,
        "ch_axis": 1,
        "quant_min": -7,
        "quant_max": 7,
        "symmetric": True,
    },
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

"""What a graph in a file may call, and which float layers it may hold: these and no others.

They compute on tensors and shapes. Nothing here reads or writes files, evaluates text, calls what
it is given, or gives access to the interpreter.
"""

from __future__ import annotations

import builtins
import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from qtoolkit.nn import functional as own
from qtoolkit.nn import qat

_OPERATORS = """
    abs add and_ eq floordiv ge getitem gt inv invert le lshift lt matmul mod mul ne neg not_ or_
    pos pow rshift sub truediv xor
"""
_MATH = "ceil exp floor log prod sqrt trunc"
_TORCH = """
    _assert abs acos add addbmm addcdiv addcmul addmm addmv all allclose amax amin any arange argmax
    argmin argsort asin atan atan2 baddbmm bitwise_and bitwise_not bitwise_or bitwise_xor bmm
    broadcast_tensors broadcast_to bucketize cat cdist ceil chunk clamp clamp_max clamp_min clone
    column_stack concat concatenate conj cos cosh count_nonzero cross cummax cummin cumprod cumsum
    deg2rad diag diag_embed diagonal diff div divide dot dsplit dstack einsum empty empty_like eq
    equal erf erfc exp exp2 expm1 eye flatten flip fliplr flipud floor floor_divide fmod frac full
    full_like gather ge greater gt heaviside hsplit hstack hypot imag index_select inner isclose
    isfinite isin isinf isnan kron kthvalue le lerp less lgamma linspace log log10 log1p log2
    logaddexp logical_and logical_not logical_or logical_xor logspace logsumexp lt masked_fill
    masked_select matmul max maximum mean median meshgrid min minimum mm mode moveaxis movedim mul
    multiply mv nan_to_num nanmean nansum narrow ne neg negative norm not_equal numel ones ones_like
    outer permute pow prod quantile rad2deg rand rand_like randn randn_like real reciprocal
    relu remainder repeat_interleave reshape roll rot90 round rsqrt rsub scatter scatter_add select
    sgn sigmoid sign sin sinc sinh softmax log_softmax sort split sqrt square squeeze stack std
    std_mean sub subtract sum swapaxes swapdims t take take_along_dim tan tanh tensor_split
    tensordot tile topk transpose tril triu true_divide trunc unbind unflatten unique unsqueeze var
    var_mean vdot vsplit vstack where zeros zeros_like
"""
_FUNCTIONAL = """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool2d adaptive_max_pool3d affine_grid alpha_dropout avg_pool1d avg_pool2d
    avg_pool3d batch_norm bilinear celu channel_shuffle conv1d conv2d conv3d conv_transpose1d
    conv_transpose2d conv_transpose3d cosine_similarity dropout dropout1d dropout2d dropout3d elu
    elu_ embedding feature_alpha_dropout fold gelu glu grid_sample group_norm hardshrink
    hardsigmoid hardswish hardtanh hardtanh_ instance_norm interpolate layer_norm leaky_relu
    leaky_relu_ linear local_response_norm log_softmax logsigmoid lp_pool1d lp_pool2d max_pool1d
    max_pool2d max_pool3d mish multi_head_attention_forward normalize one_hot pad
    pairwise_distance pixel_shuffle pixel_unshuffle prelu relu relu6 relu_ rms_norm rrelu
    scaled_dot_product_attention selu sigmoid silu softmax softmin softplus softshrink softsign
    tanh tanhshrink threshold unfold
"""
_METHODS = """
    abs add addmm all amax amin any argmax argmin argsort baddbmm bfloat16 bitwise_and bitwise_not
    bitwise_or bmm bool ceil chunk clamp clamp_max clamp_min clip clone contiguous cos cpu cumsum
    detach diagonal diff dim div double dsplit eq erf exp expand expand_as expm1 flatten flip float
    floor floor_divide fmod frac gather ge gt half hsplit index_select int is_contiguous
    is_floating_point isfinite isinf isnan item le lerp log log10 log1p log2 log_softmax
    logical_and logical_not logical_or logsumexp long lt masked_fill masked_select matmul max
    maximum mean median min minimum mm movedim mul mv nan_to_num narrow ndimension ne neg new_empty
    new_full new_ones new_tensor new_zeros nonzero norm numel permute pow prod reciprocal relu
    remainder repeat repeat_interleave reshape reshape_as roll round rsqrt scatter select sigmoid
    sign sin size softmax sort split split_with_sizes sqrt square squeeze std stride sub sum
    swapaxes swapdims t take tan tanh tensor_split tile to topk transpose tril triu
    true_divide trunc type_as unbind unflatten unfold unique unsqueeze var view view_as vsplit where
"""
_ATTRIBUTES = "T device dtype H imag is_cuda layout mH mT ndim real requires_grad shape"
# Functions of packages that need not be installed, which torch.fx does not look into.
_SWIN = "_get_relative_position_bias _patch_merging_pad shifted_window_attention"
_OPTIONAL = {
    "torchvision.ops.stochastic_depth.stochastic_depth",
    *(f"torchvision.models.swin_transformer.{name}" for name in _SWIN.split()),
}
_LAYERS = """
    AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d
    AdaptiveMaxPool3d AlphaDropout AvgPool1d AvgPool2d AvgPool3d BatchNorm1d BatchNorm2d BatchNorm3d
    Bilinear CELU ChannelShuffle CircularPad1d CircularPad2d CircularPad3d ConstantPad1d
    ConstantPad2d ConstantPad3d Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d
    CosineSimilarity Dropout Dropout1d Dropout2d Dropout3d ELU Embedding EmbeddingBag
    FeatureAlphaDropout Flatten Fold GELU GLU GroupNorm GRU Hardshrink Hardsigmoid Hardswish
    Hardtanh Identity InstanceNorm1d InstanceNorm2d InstanceNorm3d LayerNorm LeakyReLU Linear
    LocalResponseNorm LogSigmoid LogSoftmax LPPool1d LPPool2d LSTM MaxPool1d MaxPool2d MaxPool3d
    Mish MultiheadAttention PixelShuffle PixelUnshuffle PReLU ReflectionPad1d ReflectionPad2d
    ReflectionPad3d ReLU ReLU6 ReplicationPad1d ReplicationPad2d ReplicationPad3d RMSNorm RNN RReLU
    SELU Sigmoid SiLU Softmax Softmax2d Softmin Softplus Softshrink Softsign Tanh Tanhshrink
    Threshold Unflatten Unfold Upsample UpsamplingBilinear2d UpsamplingNearest2d ZeroPad1d ZeroPad2d
    ZeroPad3d
"""
_OWN_LAYERS = """
    Abs Add Cat GlobalAvgPool2d Matmul Mean Mul Pad StochasticDepth Sum UpsampleBilinear2d
    UpsampleNearest2d WithNumber
"""


def _members(prefix: str, holder: Any, names: str) -> dict[str, Any]:
    # Other versions of PyTorch may lack some.
    return {f"{prefix}.{n}": getattr(holder, n) for n in names.split() if hasattr(holder, n)}


#: Functions by the name that a file gives them.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "builtins.getattr": builtins.getattr,
    **_members("operator", operator, _OPERATORS),
    **_members("math", math, _MATH),
    **_members("torch", torch, _TORCH),
    **_members("torch.nn.functional", functional, _FUNCTIONAL),
}
_FUNCTION_NAMES = {function: name for name, function in _FUNCTIONS.items()}
#: Methods of tensors.
METHODS = frozenset(_METHODS.split())
#: What ``getattr`` may read of a tensor.
ATTRIBUTES = frozenset(_ATTRIBUTES.split())
#: Float layers by the name that a file gives them.
LAYERS: dict[str, type[nn.Module]] = {
    **_members("torch.nn", nn, _LAYERS),
    "torch.nn.NonDynamicallyQuantizableLinear": nn.modules.linear.NonDynamicallyQuantizableLinear,
    **_members("qtoolkit.nn.functional", own, _OWN_LAYERS),
    "qtoolkit.nn.qat.BatchNorm1d": qat.BatchNorm1d,
    "qtoolkit.nn.qat.BatchNorm2d": qat.BatchNorm2d,
}
LAYER_NAMES = {layer: name for name, layer in LAYERS.items()}
#: Modules without a function of their own that hold others.
CONTAINERS: dict[str, type[nn.Module]] = {
    "torch.nn.Module": nn.Module,
    "torch.nn.ModuleDict": nn.ModuleDict,
    "torch.nn.ModuleList": nn.ModuleList,
    "torch.nn.Sequential": nn.Sequential,
}
CONTAINER_NAMES = {container: name for name, container in CONTAINERS.items()}


@functools.cache
def function_of(name: str) -> Callable[..., Any] | None:
    """The function of a name; None if a graph in a file may not call it.

    Raises:
        ImportError: its package is not installed.
    """
    if name not in _OPTIONAL:
        return _FUNCTIONS.get(name)
    from torchvision import ops
    from torchvision.models import swin_transformer

    leaf = name.rpartition(".")[2]
    return getattr(swin_transformer if leaf in _SWIN.split() else ops, leaf)


def name_of(function: Callable[..., Any]) -> str | None:
    """The name of a function; None if a graph in a file may not call it."""
    found = _FUNCTION_NAMES.get(function)
    if found is None:
        name = f"{getattr(function, '__module__', '')}.{getattr(function, '__name__', '')}"
        found = name if name in _OPTIONAL and function_of(name) is function else None
    return found

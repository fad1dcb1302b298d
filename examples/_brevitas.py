"""QAT of the same network through Brevitas, for comparison at low bits.

Its layers are replaced by Brevitas's own, as its examples are built: weights with one scale per
output channel, activations with one learned scale (in the log domain) that starts from a percentile
of calibration batches. Activations are quantized where qtoolkit quantizes them: after a ReLU, after
a batch norm or an addition without one, and not between a convolution and the addition it is fused
with.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import operator
import warnings
from collections.abc import Collection

import torch
from torch import fx, nn
from torch.utils.data import DataLoader

ADDITIONS = (operator.add, operator.iadd, torch.add)
CALIBRATION_BATCHES = 10


def why_missing() -> str | None:
    """Why Brevitas cannot be used here, None if it can."""
    return None if importlib.util.find_spec("brevitas") else "pip install brevitas"


def prepare_qat(
    model: nn.Module,
    loader: DataLoader,
    weight: str,
    activation_bits: int,
    eight_bits: Collection[str],
) -> nn.Module:
    """A copy of `model` with Brevitas's layers, calibrated on `loader`, in training mode.

    Args:
        weight: "int8", "int4", "int2", "ternary" or "binary".
        activation_bits: of every activation but the image, the first layer's output and what the
            last layer reads.
        eight_bits: names of the layers whose weights have 8 bits.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _prepare(model, loader, weight, activation_bits, eight_bits)


def _prepare(
    model: nn.Module, loader: DataLoader, weight: str, bits: int, eight_bits: Collection[str]
) -> nn.Module:
    from brevitas.graph.calibrate import calibration_mode

    traced = fx.symbolic_trace(copy.deepcopy(model).eval())
    _quantize_activations(traced, bits)
    _quantize_weights(traced, weight, eight_bits)
    with torch.no_grad(), calibration_mode(traced):
        for images, _ in itertools.islice(loader, CALIBRATION_BATCHES):
            traced(images)
    return traced.train()


def freeze_bn(model: nn.Module) -> None:
    """Batch norms use their running statistics from now on, also in training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


# --- weights ------------------------------------------------------------------------------------


def _weight_quantizer(weight: str) -> type:
    from brevitas.quant import Int8WeightPerChannelFloat

    class LearnedScale(Int8WeightPerChannelFloat):
        """Starts from the largest weight of a channel; learned from there on."""

        scaling_impl_type = "parameter_from_stats"
        restrict_scaling_type = "log_fp"

    class Int4(LearnedScale):
        bit_width = 4

    class Int2(LearnedScale):
        bit_width = 2
        narrow_range = False

    class Ternary(Int8WeightPerChannelFloat):
        """Scale: mean magnitude of a channel; threshold: 0.7 of it (Li 2016)."""

        quant_type = "ternary"
        scaling_stats_op = "ave"
        threshold = 0.7

    class Binary(Int8WeightPerChannelFloat):
        """Scale: mean magnitude of a channel (Rastegari 2016)."""

        quant_type = "binary"
        scaling_stats_op = "ave"

    return {
        "int8": Int8WeightPerChannelFloat,
        "int4": Int4,
        "int2": Int2,
        "ternary": Ternary,
        "binary": Binary,
    }[weight]


def _quantize_weights(traced: fx.GraphModule, weight: str, eight_bits: Collection[str]) -> None:
    from brevitas import nn as qnn
    from brevitas.quant import Uint8ActPerTensorFloat

    for name, module in list(traced.named_modules()):
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        quantizer = _weight_quantizer("int8" if name in eight_bits else weight)
        if isinstance(module, nn.Conv2d):
            new = qnn.QuantConv2d(
                module.in_channels,
                module.out_channels,
                module.kernel_size,
                module.stride,
                module.padding,
                module.dilation,
                module.groups,
                bias=module.bias is not None,
                weight_quant=quantizer,
            )
        else:
            new = qnn.QuantLinear(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                weight_quant=quantizer,
                input_quant=Uint8ActPerTensorFloat,  # it reads averages of what a ReLU gives
            )
        with torch.no_grad():
            for key, parameter in module.named_parameters():
                getattr(new, key).copy_(parameter)
        # The statistics of the quantizer are those of the weight it was made with.
        new.weight_quant.init_tensor_quant()
        _set(traced, name, new)


def _set(traced: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(traced.get_submodule(parent), leaf, module)


# --- activations --------------------------------------------------------------------------------


def _quantize_activations(traced: fx.GraphModule, bits: int) -> None:
    from brevitas import nn as qnn
    from brevitas.quant import Int8ActPerTensorFloat, Uint8ActPerTensorFloat

    class Signed(Int8ActPerTensorFloat):
        restrict_scaling_type = "log_fp"
        scaling_min_val = 2e-16

    class Unsigned(Uint8ActPerTensorFloat):
        restrict_scaling_type = "log_fp"
        scaling_min_val = 2e-16

    modules = dict(traced.named_modules())
    rectified = [n for n in traced.graph.nodes if _is_relu(_called(n, modules))]
    plan: list[tuple[fx.Node, type, int]] = []
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            plan.append((node, Signed, 8))
        elif node in rectified:
            plan.append((node, Unsigned, 8 if node is rectified[0] else bits))
        elif _is_linear_value(node, modules):
            plan.append((node, Signed, bits))
    for node, quantizer, width in plan:
        name = f"{node.name}_quant"
        traced.add_module(name, qnn.QuantIdentity(act_quant=quantizer, bit_width=width))
        with traced.graph.inserting_after(node):
            new = traced.graph.call_module(name, (node,))
        node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
    traced.recompile()


def _called(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    return modules[str(node.target)] if node.op == "call_module" else None


def _is_relu(module: nn.Module | None) -> bool:
    return isinstance(module, nn.ReLU | nn.ReLU6)


def _is_linear_value(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """A batch norm or an addition that other layers read as it is, without a ReLU."""
    addition = node.op == "call_function" and node.target in ADDITIONS
    if not addition and not isinstance(_called(node, modules), nn.BatchNorm2d):
        return False
    if any(_is_relu(_called(user, modules)) for user in node.users):
        return False
    return addition or not _is_fused(node, modules)


def _is_fused(norm: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """The batch norm is the operand of an addition that its convolution can be fused with."""
    user = next(iter(norm.users))
    if len(norm.users) > 1 or user.op != "call_function" or user.target not in ADDITIONS:
        return False
    single = [
        operand
        for operand in user.all_input_nodes
        if isinstance(_called(operand, modules), nn.BatchNorm2d) and len(operand.users) == 1
    ]
    return norm is single[0]

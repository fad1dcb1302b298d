"""Mappings for training with few bits."""

from __future__ import annotations

import re
from dataclasses import replace

from torch import nn

from qtoolkit.formats import FORMATS
from qtoolkit.qconfig import (
    QConfig,
    QConfigMapping,
    TensorSpec,
    get_default_qat_qconfig_mapping,
)

METHODS = ("observed", "lsq", "lsq+", "pact")
_NAMED = {"ternary": ("ternary", 8), "binary": ("binary", 8)}
# Where one value speaks for a whole map, rounding it to few bits costs the most.
_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
_POOLING = ("AvgPool2d", "AdaptiveAvgPool2d", "mean")


def low_bit_qconfig_mapping(
    model: nn.Module,
    bits: str = "w4a4",
    *,
    method: str = "lsq",
    target: str = "x86",
    edge_bits: int | None = 8,
) -> QConfigMapping:
    """The mapping for quantization-aware training with few bits.

    The first and the last layer with a weight, in the order in which the model registers them, keep
    8 bits, as does what average pooling gives to the last one: they have few of the model's
    products and cost the most accuracy (Esser et al., "Learned Step Size Quantization", 2020,
    section 3). Those are quantized as `get_default_qat_qconfig_mapping(target)` says.

    Args:
        model: the float model.
        bits: "w<weight bits>a<activation bits>" of the integer formats, such as "w8a8", "w4a8",
            "w4a4" or "w2a4"; or "ternary" or "binary": such weights with 8-bit activations.
        method: how the scales of fewer than 8 bits are found.
            "lsq": learned (Esser 2020); "lsq+": learned with the zero points of activations
            (Bhalgat 2020); "pact": learned clipping of activations (Choi 2018), weights as "lsq";
            "observed": ranges of the data, as with 8 bits. Ternary weights are learned with the
            first three, else those of TWN (Li 2016); binary ones are those of XNOR-Net (Rastegari
            2016).
        target: the runtime, see `get_default_qconfig_mapping`: its formats' signs, and whether
            weights have a scale for each channel.
        edge_bits: 8, or None to treat all layers alike.

    Raises:
        TypeError: `model` is not a module.
        ValueError: another value of an argument; the message lists those that are allowed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"low_bit_qconfig_mapping needs a torch.nn.Module, got {type(model).__name__}"
        )
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: use one of {', '.join(METHODS)}")
    if edge_bits not in (8, None):
        raise ValueError(f"edge_bits must be 8 or None, got {edge_bits!r}")
    weight_format, activation_bits = _parse(bits)
    eight = get_default_qat_qconfig_mapping(target).global_qconfig
    assert eight is not None
    assert eight.activation is not None
    assert eight.weight is not None
    few = QConfig(
        _activation(eight.activation, activation_bits, method),
        _weight(eight.weight, weight_format, method),
    )
    mapping = QConfigMapping().set_global(few)
    return keep_edges(model, mapping, eight) if edge_bits is not None else mapping


def keep_edges(model: nn.Module, mapping: QConfigMapping, qconfig: QConfig) -> QConfigMapping:
    """The mapping with another QConfig for the first and the last layer with a weight, in the order
    in which the model registers them, and, where activations have fewer bits, for average pooling.
    """
    layers = [name for name, m in model.named_modules() if isinstance(m, _WEIGHTED)]
    if not layers:
        return mapping
    few = mapping.global_qconfig
    if few is not None and few.activation is not None and few.activation.format[-1] != "8":
        for pooling in _POOLING:
            mapping = mapping.set_module_type(pooling, qconfig)
    for name in dict.fromkeys((layers[0], layers[-1])):
        # A model that is one layer has no name to set.
        mapping = mapping.set_module_name(name, qconfig) if name else mapping.set_global(qconfig)
    return mapping


def _parse(bits: str) -> tuple[str, int]:
    """The weight's format and the activations' bits."""
    if bits in _NAMED:
        return _NAMED[bits]
    widths = sorted({f.bits for f in FORMATS.values() if f.kind == "integer"}, reverse=True)
    match = re.fullmatch(r"w(\d)a(\d)", bits) if isinstance(bits, str) else None
    if match is None or not {int(match[1]), int(match[2])} <= set(widths):
        raise ValueError(
            f"unknown bits {bits!r}: use w<bits>a<bits> with widths of {widths}, such as "
            f"'w4a4', or one of {', '.join(_NAMED)}"
        )
    return f"int{match[1]}", int(match[2])


def _activation(eight: TensorSpec, bits: int, method: str) -> TensorSpec:
    if bits == 8:
        return eight
    sign = eight.format.rstrip("0123456789")
    spec = replace(eight, format=f"{sign}{bits}")
    if method == "pact" and (sign == "int" or spec.symmetric):
        raise ValueError(
            'method "pact" is for targets with unsigned activations (x86, fbgemm, qnnpack, '
            "openvino)"
        )
    # LSQ+ begins with the range of least squared error, as the paper says.
    observer = "histogram" if method == "lsq+" else spec.observer
    return replace(spec, method=method, observer=observer, observer_options=())


def _weight(eight: TensorSpec, number_format: str, method: str) -> TensorSpec:
    if number_format == "int8":
        return eight
    learned = "lsq" if method == "pact" else method
    if number_format == "binary":
        return replace(eight, format=number_format, method="xnor")
    if number_format == "ternary":
        kind = "twn" if method == "observed" else "lsq"
        return replace(eight, format=number_format, method=kind)
    # A learned scale uses the whole format, such as [-2, 1]; an observed one mirrors around 0.
    return replace(eight, format=number_format, method=learned, symmetric=learned == "observed")

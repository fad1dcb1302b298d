"""Additions that OpenVINO's CPU plug-in makes within the step of the convolution before them.

With inputs of fixed sizes the plug-in takes an addition into the convolution's step where the
convolution's result passes a FakeQuantize; where it does not, its factors stand between the two,
and the sum becomes a step of its own, in bfloat16 on CPUs with AMX. That is decided in
``isSuitableParentForFusingSumActivation`` of
src/plugins/intel_cpu/src/transformations/snippets/x64/pass/snippets_mark_skipped.cpp.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# No number that the plug-in knows, or it would make codes of 8 or 16 bits. In a convolution's step
# with a sum it only clamps (src/plugins/intel_cpu/src/dnnl_postops_composer.cpp drops the rounding
# there). Where something else rounds, it does so to a hundredth of a step of the sum and less.
_LEVELS = 1 << 18
_CONVOLUTIONS = {"Convolution", "GroupConvolution"}


def mark_residuals(model: Any) -> None:
    """Puts a FakeQuantize between convolutions and the additions of quantized values after them.

    It clamps to what can change the sum, whose range and that of the other operand are known, and
    has so many levels that its rounding changes nothing.
    """
    from openvino import opset13 as op

    for add in model.get_ordered_ops():
        if add.get_type_name() != "Add":
            continue
        total = _only_reader(add.output(0))
        if total is None or total.get_type_name() != "FakeQuantize":
            continue
        for index in range(2):
            other = add.input_value(1 - index).get_node()
            branch = add.input_value(index)
            if other.get_type_name() == "FakeQuantize" and _is_convolved(branch, other):
                low, high = _range(total)
                other_low, other_high = _range(other)
                limits = [
                    op.constant(np.float32(limit)) for limit in (low - other_high, high - other_low)
                ]
                new = op.fake_quantize(branch, *limits, *limits, _LEVELS)
                add.input(index).replace_source_output(new.output(0))
                break


def _only_reader(output: Any) -> Any:
    readers = list(output.get_target_inputs())
    return readers[0].get_node() if len(readers) == 1 else None


def _is_convolved(output: Any, other: Any) -> bool:
    """Whether a value that is read once is that of a convolution, or of one with its bias; not of
    one that reads the other operand itself, which the plug-in leaves apart."""
    node = output.get_node()
    if _only_reader(output) is None:
        return False
    if node.get_type_name() == "Add" and node.input_value(1).get_node().get_type_name() in {
        "Constant",
        "Reshape",
    }:
        output = node.input_value(0)
        node = output.get_node()
    return (
        node.get_type_name() in _CONVOLUTIONS
        and _only_reader(output) is not None
        and node.input_value(0).get_node().get_friendly_name() != other.get_friendly_name()
    )


def _range(fake_quantize: Any) -> tuple[float, float]:
    low, high = (fake_quantize.input_value(index).get_node().data for index in (3, 4))
    return float(low), float(high)

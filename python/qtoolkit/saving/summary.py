"""The layers of a model for those who read a file without making its model."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from qtoolkit.explain import explain
from qtoolkit.nn import QuantizedModule
from qtoolkit.nn.plan import Plan
from qtoolkit.saving.container import require


@dataclass(frozen=True)
class LayerInfo:
    """One layer of a file.

    Attributes:
        name: dotted name in the float model.
        kind: class of the layer, or name of the function.
        format: what it reads and writes, or ``"float32"``.
        reason: why it stayed in float; empty if it did not.
        scales: the least and greatest scale of its weight and of each activation, by name.
        ranges: the real numbers that each activation's codes stand for, least and greatest; what
            its observer found, rounded to whole steps.
    """

    name: str
    kind: str
    format: str
    reason: str
    scales: dict[str, tuple[float, float]]
    ranges: dict[str, tuple[float, float]]


def _numbers(layer: QuantizedModule) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scales and ranges of a layer."""
    scales: dict[str, Any] = {}
    ranges: dict[str, Any] = {}
    for name, tensor in layer._buffers.items():
        base = name.removesuffix("_scale")
        if tensor is None or base == name or not tensor.numel():
            continue
        scales[base] = [float(tensor.min()), float(tensor.max())]
        zero_point = layer._buffers.get(f"{base}_zero_point")
        if zero_point is None:
            continue
        codes = [0, 255]
        if base == "output":
            codes = [layer.quant_min, layer.quant_max]
        elif getattr(layer, "input_format", "uint8") == "int8":
            codes = [-128, 127]
        ranges[base] = [float(tensor) * (code - int(zero_point)) for code in codes]
    return scales, ranges


def summarize(model: nn.Module) -> list[dict[str, Any]]:
    """The layers of a converted model as JSON, as ``explain`` lists them."""
    numbers: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for module in model.modules():  # in the order of explain
        if isinstance(module, QuantizedModule):
            numbers.append(_numbers(module))
        elif isinstance(module, Plan):
            numbers += [({}, {}) for _ in module.layers]
    rows = []
    for index, layer in enumerate(explain(model).layers):
        row = dataclasses.asdict(layer)
        del row["kernel"]  # of this machine
        scales, ranges = numbers[index] if index < len(numbers) else ({}, {})
        rows.append({**row, "scales": scales, "ranges": ranges})
    return rows


def read_layers(value: Any) -> tuple[LayerInfo, ...]:
    """What ``summarize`` wrote.

    Raises:
        InvalidFileError: anything else.
    """
    names = {field.name for field in dataclasses.fields(LayerInfo)}
    require(isinstance(value, list), "its layers must be a list")
    result = []
    for row in value:
        good = isinstance(row, dict) and row.keys() == names
        require(good, f"its layers must have {sorted(names)}")
        pairs: dict[str, Any] = {}
        for name in ("scales", "ranges"):
            good = isinstance(row[name], dict) and all(_is_pair(p) for p in row[name].values())
            require(good, f"the {name} of a layer must be pairs of numbers")
            pairs[name] = {key: (float(p[0]), float(p[1])) for key, p in row[name].items()}
        texts = {name: row[name] for name in names - pairs.keys()}
        require(all(isinstance(text, str) for text in texts.values()), "a layer's name is no text")
        result.append(LayerInfo(**texts, **pairs))
    return tuple(result)


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(n) is float and math.isfinite(n) for n in value)
    )

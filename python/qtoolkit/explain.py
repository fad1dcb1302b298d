"""Which layer computes how, and what stayed in float and why."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from qtoolkit import _C
from qtoolkit.fake_quantize import FakeQuantize
from qtoolkit.graph.prepare import is_observer
from qtoolkit.graph.report import get_report
from qtoolkit.nn.base import QuantizedModule
from qtoolkit.nn.plan import Plan
from qtoolkit.text_table import text_table


@dataclass(frozen=True)
class LayerExplanation:
    """One layer.

    Attributes:
        name: dotted name in the float model.
        kind: class of the layer, or name of the function.
        format: what it reads and writes, such as ``"uint8 x int8 -> uint8"``, or ``"float32"``.
        kernel: the kernel and the instruction-set path that computes it here; empty in float.
        reason: why it stayed in float; empty if it did not.
    """

    name: str
    kind: str
    format: str
    kernel: str
    reason: str = ""


@dataclass(frozen=True)
class Explanation:
    """The layers of a model; ``print`` it for a table."""

    layers: tuple[LayerExplanation, ...]

    @property
    def float_layers(self) -> tuple[LayerExplanation, ...]:
        """The layers that stayed in float, with the reasons."""
        return tuple(layer for layer in self.layers if layer.reason)

    def __str__(self) -> str:
        rows = [("layer", "kind", "format", "kernel, or why it is float")]
        rows += [
            (layer.name, layer.kind, layer.format, layer.reason or layer.kernel)
            for layer in self.layers
        ]
        return text_table(rows)


def explain(model: nn.Module) -> Explanation:
    """Explains a prepared, converted, compiled, dynamically or weight-only quantized model.

    Raises:
        ValueError: the model is none of these.
    """
    report = get_report(model)
    if report is None:
        raise ValueError(
            "explain needs the result of qt.prepare, qt.prepare_qat, qt.convert, "
            "qt.quantize_dynamic or qt.quantize_weights"
        )
    layers = []
    # A fake-quantize module and its observer are of one tensor.
    inner = {m.observer for m in model.modules() if isinstance(m, FakeQuantize)}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule):
            kernel = module.kernel
            path = f"{kernel} ({_C.selected_path(kernel)})" if kernel else ""
            layers.append(
                LayerExplanation(module.source or name, module.kind(), module.formats(), path)
            )
        elif isinstance(module, Plan):
            for layer in module.layers:
                known = layer.kernel in _C.kernel_names()
                path = f" ({_C.selected_path(layer.kernel)})" if known else ""
                path = f"{layer.kernel}{path}, in plan {name}"
                layers.append(LayerExplanation(layer.source, layer.kind, layer.format, path))
        elif is_observer(module) and module not in inner:
            kind = "fake-quantize" if isinstance(module, FakeQuantize) else "observed"
            kind = "simulated" if report.converted else kind
            spec = module.spec
            layers.append(
                LayerExplanation(
                    str(module.name) or name,
                    type(module).__name__,
                    str(spec.format),
                    f"{kind}, {spec.granularity}",
                )
            )
    layers += [
        LayerExplanation(layer.name, layer.kind, "float32", "", layer.reason)
        for layer in report.uncaptured + report.floats
    ]
    return Explanation(tuple(layers))

"""The prepared model as it will compute once it is converted, in float."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from qtoolkit.graph.modules import called_module
from qtoolkit.graph.prepare import is_observer
from qtoolkit.graph.shared import SharedObserver
from qtoolkit.nn.weights import dequantized, pinned_weight
from qtoolkit.observers import Observer
from qtoolkit.ops import fake_quantize_per_tensor

if TYPE_CHECKING:
    from qtoolkit.algorithms.context import Layer

#: What rounds each observer's value.
Quantizers = dict[nn.Module, Callable[[Tensor], Tensor]]


@contextmanager
def silent_observers(model: nn.Module) -> Iterator[None]:
    """Inside, the observers of activations record nothing."""
    enabled = [m for m in model.modules() if isinstance(m, Observer) and m.enabled]
    try:
        for observer in enabled:
            observer.enabled = False
        yield
    finally:
        for observer in enabled:
            observer.enabled = True


@contextmanager
def simulation(
    prepared: nn.Module, layers: Sequence[Layer], *, weights: bool, activations: bool
) -> Iterator[Quantizers]:
    """Inside, the prepared model computes what the converted one will.

    Returns:
        What rounds the value of each observer; an algorithm may replace entries.
    """
    with ExitStack() as stack:
        quantizers: Quantizers = {}
        if weights:
            stack.enter_context(_quantized_weights(layers))
        if activations:
            quantizers = stack.enter_context(_quantized_activations(prepared, layers))
        yield quantizers


@contextmanager
def _quantized_weights(layers: Sequence[Layer]) -> Iterator[None]:
    # Before any is replaced: the calls of one layer share their weight.
    rounded = [dequantized(layer.integer_weight(), layer.module) for layer in layers]
    kept = {layer.module.weight: layer.module.weight.data for layer in layers}
    try:
        for layer, weight in zip(layers, rounded):
            layer.module.weight.data = weight
        yield
    finally:
        for parameter, data in kept.items():
            parameter.data = data
        for layer in layers:
            pinned = pinned_weight(layer.module)
            if pinned is not None:
                layer.module.weight.data = dequantized(pinned, layer.module)


@contextmanager
def _quantized_activations(prepared: nn.Module, layers: Sequence[Layer]) -> Iterator[Quantizers]:
    # What is added to a residual is not rounded before that.
    branches = {called_module(layer.match.branch, layer.graph) for layer in layers}
    observers: list[Any] = [
        module for module in prepared.modules() if is_observer(module) and module not in branches
    ]
    quantizers: Quantizers = {}

    def hook(observer: nn.Module, _: Any, output: Tensor) -> Tensor:
        return quantizers[observer](output)

    handles = []
    try:
        for observer in observers:
            if isinstance(observer, SharedObserver) and observer.records:
                continue  # it calls the other observer, which rounds
            quantizers[observer] = fixed_quantizer(observer)
            handles.append(observer.register_forward_hook(hook))
        with silent_observers(prepared):
            yield quantizers
    finally:
        for handle in handles:
            handle.remove()


def fixed_quantizer(observer: Any) -> Callable[[Tensor], Tensor]:
    """Rounds to the codes that an observer gives now; gradients pass straight."""
    scale, zero_point = observer.calculate_qparams()
    limits = observer.spec.quant_min, observer.spec.quant_max

    def quantize(x: Tensor) -> Tensor:
        return fake_quantize_per_tensor(x, scale, zero_point, *limits)

    return quantize

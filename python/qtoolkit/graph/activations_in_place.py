"""Activation functions that overwrite their input while a prepared model is calibrated.

Fresh memory costs more than the function. Networks made for PyTorch compute these in place for that
reason; ``graph.inplace`` undoes it, as quantization gives a value's readers different tensors.
During calibration they get the same one, and nobody misses what the function alone reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx, nn

from qtoolkit.graph.modules import called_module, graph_modules
from qtoolkit.graph.plain import is_plain
from qtoolkit.nn import functional

_FUNCTIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.Mish, nn.Hardswish)
# What gives a tensor that nothing else holds.
_MAKERS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, functional.Add, functional.Mul),
)


def _is_alone(node: object, module: fx.GraphModule) -> bool:
    """True for a fresh tensor that one node reads and no hook sees."""
    called = called_module(node, module)
    return is_plain(called, _MAKERS) and isinstance(node, fx.Node) and len(node.users) == 1


def _that_may(module: fx.GraphModule) -> Iterator[nn.Module]:
    """The functions that may overwrite their input at each of their calls."""
    refused: set[nn.Module] = set()
    allowed: set[nn.Module] = set()
    for node in module.graph.nodes:
        called = called_module(node, module)
        if not is_plain(called, _FUNCTIONS):
            continue
        assert called is not None
        (allowed if _is_alone(node.args[0], module) else refused).add(called)
    yield from allowed - refused


@contextmanager
def activations_in_place(model: nn.Module) -> Iterator[None]:
    """Lets them while the block runs; without gradients, as these may need the input."""
    changed = [
        function
        for _, module in graph_modules(model)
        for function in _that_may(module)
        if not function.inplace
    ]
    for function in changed:
        function.inplace = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for function in changed:
            function.inplace = False  # type: ignore[assignment]

"""Switches of a QAT model, for all layers or for those whose names match a pattern."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import TypeVar

from torch import nn

from qtoolkit.fake_quantize import FakeQuantize
from qtoolkit.graph.report import get_report
from qtoolkit.nn.qat.batch_norm import _FreezableBatchNorm
from qtoolkit.qconfig import matches_name

# A model to be quantized names the values that float layers give it "conv1 (input)".
_INPUT = " (input)"
# The module that quantizes the value of a layer, or of a ReLU that is fused into one.
_CHILD = "_fake_quantize"

Model = TypeVar("Model", bound=nn.Module)


def freeze_bn(model: Model, pattern: str = "*", *, frozen: bool = True) -> Model:
    """Lets batch norms of a QAT model use their running statistics, also in training, and leaves
    these unchanged.

    Args:
        model: the result of ``prepare_qat``, or what holds it (DDP, a LightningModule, ...).
        pattern: which batch norms, by dotted name, as in ``QConfigMapping.set_module_name``: a
            shell pattern for the name or for that of a module which holds it ("layer1", "*.bn2").
        frozen: False for statistics of the batch again.

    Returns:
        The model, changed in place.

    Raises:
        ValueError: the model is not the result of ``prepare_qat``, or no batch norm has such a
            name.
    """
    found = [
        (module, [name], root)
        for root in qat_models(model, "freeze_bn")
        for name, module in root.named_modules()
        if isinstance(module, _FreezableBatchNorm)
    ]
    for module, root in _matching("freeze_bn", "batch norm", pattern, found):
        module.freeze(frozen)
        # Thawed, it follows the mode of the model.
        module.train(root.training)
    return model


def freeze_observers(model: Model, pattern: str = "*", *, frozen: bool = True) -> Model:
    """Keeps ranges of a QAT model, of activations and of weights, as they are, also in training.

    Args:
        model: the result of ``prepare_qat``, or what holds it.
        pattern: whose ranges, by name of the layer as in ``QConfigMapping.set_module_name``:
            "conv1" for its weight, its output and, where a float value enters it, its input;
            "conv1.weight" for its weight alone.
        frozen: False to let them follow the data again.

    Returns:
        The model, changed in place.

    Raises:
        ValueError: the model is not the result of ``prepare_qat``, or no quantized value has such a
            name.
    """
    for module in _fake_quantizers("freeze_observers", model, pattern):
        if frozen:
            module.freeze()
        else:
            module.unfreeze()
    return model


def enable_fake_quant(model: Model, pattern: str = "*") -> Model:
    """Switches the rounding of values on again; see ``disable_fake_quant``."""
    for module in _fake_quantizers("enable_fake_quant", model, pattern):
        module.enable_fake_quant(True)
    return model


def disable_fake_quant(model: Model, pattern: str = "*") -> Model:
    """Lets values pass without rounding; their ranges are still observed, unless frozen.

    ``convert`` quantizes these layers all the same: set them to None in the mapping to keep them in
    float.

    Args:
        model: the result of ``prepare_qat``, or what holds it.
        pattern: which values, as in ``freeze_observers``.

    Returns:
        The model, changed in place.

    Raises:
        ValueError: as ``freeze_observers``.
    """
    for module in _fake_quantizers("disable_fake_quant", model, pattern):
        module.enable_fake_quant(False)
    return model


def qat_models(model: nn.Module, function: str) -> list[nn.Module]:
    """The results of ``prepare_qat`` that a module is or holds.

    Names of layers count from there, whatever wraps the model.

    Raises:
        ValueError: there is none.
    """
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module in inside or get_report(module) is None:
            continue
        if any(isinstance(child, FakeQuantize) for child in module.modules()):
            found.append(module)
            inside.update(module.modules())
    if not found:
        raise ValueError(f"{function} needs the result of qt.prepare_qat")
    return found


def _fake_quantizers(function: str, model: nn.Module, pattern: str) -> Iterator[FakeQuantize]:
    found = [
        (module, [module.name.removesuffix(_INPUT), name, name.removesuffix(_CHILD)], root)
        for root in qat_models(model, function)
        for name, module in root.named_modules()
        if isinstance(module, FakeQuantize)
    ]
    for module, _ in _matching(function, "quantized value", pattern, found):
        yield module


Module = TypeVar("Module", bound=nn.Module)


def _matching(
    function: str, kind: str, pattern: str, found: list[tuple[Module, list[str], nn.Module]]
) -> list[tuple[Module, nn.Module]]:
    """Those of the modules, given with their names and models, that the pattern fits.

    "*" asks for all there are, be it none.
    """
    if not isinstance(pattern, str) or not pattern:
        raise TypeError(f"{function}: the pattern must be a name, got {pattern!r}")
    chosen = [
        (module, root)
        for module, names, root in found
        if any(matches_name(pattern, name) for name in names)
    ]
    if not chosen and pattern != "*":
        names = sorted({names[0] for _, names, _ in found})
        close = get_close_matches(pattern, names, n=3, cutoff=0.0)
        hint = f"; there are {len(names)}, such as {', '.join(map(repr, close))}" if close else ""
        raise ValueError(f"{function}: no {kind} of this model fits {pattern!r}{hint}")
    return chosen

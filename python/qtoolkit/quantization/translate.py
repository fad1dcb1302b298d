"""From torch.ao's QConfigs and mappings, ours and its own, to qtoolkit's."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qtoolkit import fake_quantize, observers
from qtoolkit.dynamic import DYNAMIC_LAYERS
from qtoolkit.qconfig import QConfig, QConfigMapping, TensorSpec
from qtoolkit.quantization import observer as ob
from qtoolkit.quantization.errors import UnsupportedError

# torch.ao's own classes are known by name, so that nothing here needs torch.ao.
_CLASSES: dict[str, type[ob.ObserverBase]] = {
    cls.__name__: cls
    for cls in (
        ob.MinMaxObserver,
        ob.MovingAverageMinMaxObserver,
        ob.HistogramObserver,
        ob.PerChannelMinMaxObserver,
        ob.MovingAveragePerChannelMinMaxObserver,
    )
}
_FLOAT = {"PlaceholderObserver", "NoopObserver", "ReuseInputObserver", "Identity"}


def spec_of(factory: Any, where: str) -> TensorSpec | None:
    """How a factory's observer quantizes; None if the tensor stays in float.

    Args:
        factory: an observer's or fake-quantize module's class or factory, from here or torch.ao.
        where: what it is for, for error messages.

    Raises:
        UnsupportedError: there is no counterpart.
        TypeError: it is no factory.
    """
    if factory is None:
        return None
    if isinstance(factory, TensorSpec):
        return factory
    if not callable(factory):
        raise TypeError(f"{where}: expected an observer's class or factory, got {factory!r}")
    return _spec_of_instance(factory(), where)


def _spec_of_instance(made: Any, where: str) -> TensorSpec | None:
    if "PerChannel" in type(made).__name__:
        _check_not_averaged(getattr(made, "averaging_constant", None), where)
    inner = getattr(made, "activation_post_process", None)
    if inner is not None:
        return _spec_of_instance(inner, where)
    if isinstance(made, observers.Observer | fake_quantize.FakeQuantize):
        _check_not_overridden(made, where)
        return made.spec
    kind = type(made)
    if kind.__name__ == "RecordingObserver":
        return TensorSpec("uint8", observer="minmax")
    if kind.__name__ in _FLOAT:
        dtype = getattr(made, "dtype", torch.float32)
        if dtype in (torch.float16, torch.bfloat16):
            ob.format_name(dtype, None, None)  # raises, with what to use
        return None
    known = _CLASSES.get("MinMaxObserver" if "FixedQParams" in kind.__name__ else kind.__name__)
    if known is None or not kind.__module__.startswith("torch."):
        raise UnsupportedError(
            f"{where}: {kind.__qualname__} has no counterpart; use one of {', '.join(_CLASSES)}, "
            "or write a class of qtoolkit.observers (CONTRIBUTING.md) and give its TensorSpec"
        )
    keywords = {} if getattr(made, "ch_axis", -1) == -1 else {"ch_axis": made.ch_axis}
    reduced: dict[str, Any] = (
        {} if made.reduce_range else {"quant_min": made.quant_min, "quant_max": made.quant_max}
    )
    options: dict[str, Any] = {name: getattr(made, name) for name in known.options_of()}
    return known(
        dtype=made.dtype,
        qscheme=made.qscheme,
        is_dynamic=getattr(made, "is_dynamic", False),
        **reduced,
        **keywords,
        **options,
    ).spec


def _check_not_averaged(averaging_constant: float | None, where: str) -> None:
    """A weight is there as a whole at each call, so its range is that of now."""
    if averaging_constant not in (None, 0.01):
        raise UnsupportedError(
            f"{where}: averaging_constant={averaging_constant} is for activations: a weight's "
            "range is measured anew at each call; leave it out"
        )


def _check_not_overridden(made: nn.Module, where: str) -> None:
    """An observer of the user's own would be replaced by the one that its spec names."""
    kind = type(made)
    if not kind.__module__.startswith("qtoolkit."):
        known = observers.get_observer_class(made.spec.observer)  # type: ignore[union-attr, arg-type]
        if kind is not known:
            raise UnsupportedError(
                f"{where}: {kind.__qualname__} is a class of its own; register it with "
                "qtoolkit.observers.register_observer (CONTRIBUTING.md) and give a TensorSpec that "
                "names it"
            )


def qconfig_of(qconfig: Any, where: str) -> QConfig | None:
    """A QConfig of torch.ao as qtoolkit's; qtoolkit's own are taken as they are.

    Raises:
        UnsupportedError, TypeError: as ``spec_of``.
    """
    if qconfig is None or isinstance(qconfig, QConfig):
        return qconfig
    if not (hasattr(qconfig, "activation") and hasattr(qconfig, "weight")):
        raise TypeError(f"{where}: expected a QConfig or None, got {type(qconfig).__name__}")
    activation = spec_of(qconfig.activation, f"{where}: activation")
    # Where only activations are quantized, the weight may be given as float16.
    passing = getattr(qconfig.weight, "__name__", "") in _FLOAT
    weight = None if passing else spec_of(qconfig.weight, f"{where}: weight")
    if weight is not None:
        constant = dict(weight.observer_options).get("averaging_constant")
        _check_not_averaged(constant, f"{where}: weight")
    if weight is not None and (weight.format.startswith("int") or activation is not None):
        # Kernels take signed weights without a zero point.
        signed = weight.format.removeprefix("u")
        weight = replace(weight, format=signed, symmetric=True)
    return QConfig(activation, weight)


def _inherits(qconfig: Any) -> bool:
    """True for what torch.ao's default mapping sets for kinds of layers that need nothing here:
    those that only move values, and functions of a known range."""
    if qconfig is None or isinstance(qconfig, QConfig) or not callable(qconfig.activation):
        return False
    made = qconfig.activation()
    names = {type(made).__name__, type(getattr(made, "activation_post_process", made)).__name__}
    return any("FixedQParams" in name or name == "ReuseInputObserver" for name in names)


def dynamic_layers(model: nn.Module, mapping: QConfigMapping) -> list[str]:
    """Names of the layers with quantized weights and, by their mapping, no quantized activations:
    those that quantize activations as they come, and tables of embeddings."""
    names = []
    for name, module in model.named_modules():
        qconfig = mapping.qconfig_for(name, type(module))
        if qconfig is None or qconfig.activation is not None or qconfig.weight is None:
            continue
        fits = is_table(module) == qconfig.weight.format.startswith("uint")
        if name and fits and isinstance(module, DYNAMIC_LAYERS):
            names.append(name)
    return names


def is_table(module: nn.Module) -> bool:
    """True for embeddings, whose weights alone torch.ao quantizes with a range for each row."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def mapping_of_modules(model: nn.Module) -> QConfigMapping:
    """The mapping that the attributes ``qconfig`` of modules give; a module's goes before those of
    the modules that hold it."""
    mapping = QConfigMapping().set_global(qconfig_of(getattr(model, "qconfig", None), "model"))
    known: dict[int, QConfig | None] = {}
    kept: list[Any] = []  # ids stay those of one object
    inherited: dict[str, Any] = {"": getattr(model, "qconfig", None)}
    for name, module in model.named_modules():
        if not name:
            continue
        parent = inherited[name.rpartition(".")[0]]
        own = getattr(module, "qconfig", parent)
        inherited[name] = own
        if own is parent:
            continue
        if id(own) not in known:
            known[id(own)] = qconfig_of(own, f"{name}.qconfig")
            kept.append(own)
        mapping = mapping.set_module_name(name, known[id(own)])
    return mapping


def mapping_of(given: Any, model: nn.Module) -> QConfigMapping:
    """A QConfigMapping of torch.ao, or the dict that it was before, as qtoolkit's.

    The n-th call of an object type is not in it; see ``quantize_fx``.

    Raises:
        UnsupportedError, TypeError: as ``spec_of``.
    """
    if isinstance(given, QConfigMapping):
        return given
    names = [name for name, _ in model.named_modules() if name]
    mapping = QConfigMapping().set_global(qconfig_of(given.global_qconfig, "global"))
    for object_type, qconfig in given.object_type_qconfigs.items():
        where = getattr(object_type, "__name__", str(object_type))
        if _inherits(qconfig):
            continue
        mapping = mapping.set_module_type(object_type, qconfig_of(qconfig, where))
    # The first expression counts there, the last setting here.
    for expression, qconfig in reversed(given.module_name_regex_qconfigs.items()):
        for name in names:
            if re.match(expression, name):
                mapping = mapping.set_module_name(name, qconfig_of(qconfig, expression))
    by_depth = sorted(given.module_name_qconfigs.items(), key=lambda entry: entry[0].count("."))
    for name, qconfig in by_depth:
        if name:
            mapping = mapping.set_module_name(name, qconfig_of(qconfig, name))
    return mapping

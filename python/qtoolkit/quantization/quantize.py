"""torch.ao's eager mode: prepare, convert and what goes with them."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from qtoolkit.graph.prepare import is_observer
from qtoolkit.graph.report import get_report
from qtoolkit.quantization.eager import (
    WaitingForward,
    captured_copy,
    convert_in_place,
    fill_uncalibrated,
    is_prepared,
)
from qtoolkit.quantization.errors import UnsupportedError
from qtoolkit.quantization.stubs import replace_foreign_stubs
from qtoolkit.quantization.translate import dynamic_layers, mapping_of_modules


def propagate_qconfig_(module: nn.Module, qconfig_dict: dict[str, Any] | None = None) -> None:
    """Gives every module that has no ``qconfig`` that of the module which holds it.

    Args:
        module: changed in place.
        qconfig_dict: QConfigs by class or dotted name, which go before inherited ones.
    """
    given: dict[Any, Any] = qconfig_dict or {}
    inherited: dict[str, Any] = {}
    for name, child in module.named_modules():
        parent = inherited.get(name.rpartition(".")[0]) if name else given.get("")
        chosen = given.get(name, given.get(type(child), parent)) if name else parent
        child.qconfig = inherited[name] = getattr(child, "qconfig", chosen)


def prepare(
    model: nn.Module,
    inplace: bool = False,
    allow_list: Any = None,
    observer_non_leaf_module_list: Any = None,
    prepare_custom_config_dict: dict[str, Any] | None = None,
    *,
    example_inputs: tuple[Any, ...] | None = None,
) -> nn.Module:
    """Makes a model ready for calibration.

    It is captured, and its observers placed, when it is called for the first time.

    Args:
        model: float, with the attribute ``qconfig`` on it or on parts of it.
        inplace: change the model itself.
        allow_list, observer_non_leaf_module_list: None; set ``qconfig`` on modules instead.
        prepare_custom_config_dict: None or empty; see ``quantize_fx.prepare_fx``.
        example_inputs: what ``model.forward`` takes; prepares it at once, for a state dict that is
            to be loaded.

    Raises:
        UnsupportedError: another value of an argument, or an observer without counterpart.
        ValueError: the model is prepared or converted already.
    """
    for name, value in (
        ("allow_list", allow_list),
        ("observer_non_leaf_module_list", observer_non_leaf_module_list),
        ("prepare_custom_config_dict", prepare_custom_config_dict),
    ):
        if value:
            raise UnsupportedError(
                f"prepare: {name} must be None; set module.qconfig (None keeps it in float), or "
                "use prepare_fx"
            )
    return _prepare(model, inplace, example_inputs, qat=False)


def prepare_qat(
    model: nn.Module,
    mapping: Any = None,
    inplace: bool = False,
    *,
    example_inputs: tuple[Any, ...] | None = None,
) -> nn.Module:
    """Makes a model ready for quantization-aware training; see ``prepare``.

    Parameters stay the objects that an optimizer may hold already.

    Args:
        model: float, in training mode, with ``qconfig``.
        mapping: None; there are no other QAT modules.
        inplace: change the model itself.
        example_inputs: as in ``prepare``.

    Raises:
        UnsupportedError, ValueError: as ``prepare``.
    """
    if mapping:
        raise UnsupportedError("prepare_qat: mapping must be None; set module.qconfig instead")
    if not model.training:
        raise ValueError("prepare_qat needs a model in training mode: call model.train() first")
    return _prepare(model, inplace, example_inputs, qat=True)


def _prepare(
    model: nn.Module, inplace: bool, example_inputs: tuple[Any, ...] | None, *, qat: bool
) -> nn.Module:
    if get_report(model) is not None or is_prepared(model):
        raise ValueError("prepare: this model is prepared or converted already")
    model = replace_foreign_stubs(model if inplace else copy.deepcopy(model))
    if not any(getattr(module, "qconfig", None) for module in model.modules()):
        warnings.warn(
            "None of the submodule got qconfig applied. Make sure you passed correct configuration "
            "by setting the .qconfig attribute of the model or of its modules",
            stacklevel=3,
        )
    mapping = mapping_of_modules(model)
    waiting = WaitingForward(model, mapping, dynamic_layers(model, mapping), qat=qat)
    model.forward = waiting
    if example_inputs is not None:
        waiting.prepare(example_inputs)
    return model


def convert(
    module: nn.Module,
    mapping: Any = None,
    inplace: bool = False,
    remove_qconfig: bool = True,
    is_reference: bool = False,
    convert_custom_config_dict: dict[str, Any] | None = None,
    use_precomputed_fake_quant: bool = False,
) -> nn.Module:
    """The quantized model.

    A prepared model that was never called is converted at its first call, with a warning: a state
    dict of a converted one may be loaded before.

    Args:
        module: the result of ``prepare`` or ``prepare_qat``, after calibration or training.
        mapping, convert_custom_config_dict: None.
        inplace: change the module itself.
        remove_qconfig: delete the attributes ``qconfig``.
        is_reference: False; use ``qtoolkit.export`` for other runtimes.
        use_precomputed_fake_quant: accepted; learned ranges are always kept.

    Raises:
        ValueError: it is not prepared.
        UnsupportedError: another value of an argument.
    """
    if mapping or convert_custom_config_dict:
        raise UnsupportedError(
            "convert: mapping and convert_custom_config_dict must be None; set module.qconfig to "
            "None before prepare for what stays in float"
        )
    if is_reference:
        raise UnsupportedError(
            "convert: there are no reference modules; qtoolkit.export writes the model for other "
            "runtimes"
        )
    if not is_prepared(module):
        raise ValueError("convert needs the result of prepare or prepare_qat")
    module = module if inplace else copy.deepcopy(module)
    waiting = module.__dict__.get("forward")
    if isinstance(waiting, WaitingForward):
        warnings.warn(
            "convert: the prepared model was never called, so nothing is known of its activations; "
            "it is converted when it is called. Run it on calibration data before convert, or load "
            "a state dict now",
            stacklevel=2,
        )
        waiting.convert_later()
        return module
    fill_uncalibrated(module)
    convert_in_place(module)
    if remove_qconfig:
        for child in module.modules():
            child.__dict__.pop("qconfig", None)
    return module


def quantize(
    model: nn.Module,
    run_fn: Callable[..., Any],
    run_args: Any,
    mapping: Any = None,
    inplace: bool = False,
) -> nn.Module:
    """``prepare``, ``run_fn(model, *run_args)`` for calibration, and ``convert``."""
    model = prepare(model if inplace else copy.deepcopy(model), inplace=True)
    run_fn(model.eval(), *run_args)
    return convert(model, mapping, inplace=True)


def quantize_qat(
    model: nn.Module, run_fn: Callable[..., Any], run_args: Any, inplace: bool = False
) -> nn.Module:
    """``prepare_qat``, ``run_fn(model, *run_args)`` for training, and ``convert``."""
    model = model if inplace else copy.deepcopy(model)
    prepare_qat(model.train(), inplace=True)
    run_fn(model, *run_args)
    return convert(model.eval(), inplace=True)


def to_qtoolkit(model: nn.Module) -> nn.Module:
    """The model of qtoolkit's own workflow that a prepared or converted eager model stands for.

    ``qt.compile``, ``qt.save`` and ``qt.export`` take it. Its layers are those of the eager model.

    Raises:
        ValueError: the model is not prepared or converted.
    """
    if get_report(model) is None:
        raise ValueError("to_qtoolkit needs a prepared model that was called, or a converted one")
    return captured_copy(model)


def default_eval_fn(model: nn.Module, calib_data: Any) -> None:
    """Runs a model on pairs of input and target, for ``quantize``."""
    for data, _ in calib_data:
        model(data)


def get_observer_state_dict(mod: nn.Module) -> OrderedDict[str, Any]:
    """The part of a prepared model's state dict that its observers hold."""
    prefixes = tuple(f"{name}." for name, module in mod.named_modules() if is_observer(module))
    state = mod.state_dict().items()
    return OrderedDict((key, value) for key, value in state if key.startswith(prefixes))


def load_observer_state_dict(mod: nn.Module, obs_dict: Mapping[str, Any]) -> None:
    """Gives a prepared model the state that ``get_observer_state_dict`` returned.

    Raises:
        ValueError: the observers are others; names the first ones.
    """
    differing = sorted(get_observer_state_dict(mod).keys() ^ obs_dict.keys())
    if differing:
        raise ValueError(
            f"load_observer_state_dict: the observers are of another model: {differing[:3]}"
        )
    mod.load_state_dict(obs_dict, strict=False)

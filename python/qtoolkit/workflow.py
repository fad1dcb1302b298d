"""The steps from a float model to a quantized one: prepare, calibrate or train, convert."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from qtoolkit.batches import dict_inputs
from qtoolkit.distributed import (
    gathered,
    install_synchronizer,
    on_all_ranks,
    remove_synchronizer,
    synchronize,
    unwrapped,
)
from qtoolkit.eval_mode import eval_mode
from qtoolkit.fake_quantize import ON_NONFINITE, FakeQuantize
from qtoolkit.graph.activations_in_place import activations_in_place
from qtoolkit.graph.lower import lower_graph
from qtoolkit.graph.modules import graph_modules
from qtoolkit.graph.prepare import is_observer, prepare_model
from qtoolkit.graph.report import get_report, model_inputs, set_report
from qtoolkit.progress import batch_bar
from qtoolkit.qconfig import (
    QConfigMapping,
    get_default_qat_qconfig_mapping,
    get_default_qconfig_mapping,
)


def _as_tuple(example_inputs: Any) -> tuple[Any, ...]:
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,)
    if isinstance(example_inputs, tuple | list) and example_inputs:
        return tuple(example_inputs)
    raise TypeError(
        "example_inputs must be a non-empty tuple of what the model's forward takes, such as "
        f"(torch.randn(1, 3, 224, 224),); got {type(example_inputs).__name__}"
    )


def _check_model(model: Any, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function} needs a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"{function} needs the Python module, not its TorchScript")
    if get_report(model) is not None:
        raise ValueError(f"{function}: this model is prepared or converted already")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise ValueError(
                f"{function} needs a float32 model, but {name} is {parameter.dtype}: call "
                "model.float() on a copy first"
            )


def prepare(
    model: nn.Module,
    mapping: QConfigMapping | None = None,
    example_inputs: Any = None,
) -> nn.Module:
    """A copy of a float model that is ready for calibration (static post-training quantization).

    The copy is in evaluation mode: batch norms are folded into the layers before them (Jacob et al.
    2018, section 3.2), layers are fused, and observers stand where values will be codes. Modules
    keep their names. The model itself is not changed.

    Args:
        model: the float model.
        mapping: how each layer is quantized; ``get_default_qconfig_mapping("x86")`` if None.
        example_inputs: what ``model.forward`` takes, as a tuple; used to trace it and for shapes.

    Raises:
        TypeError: ``model`` is not a module, or ``example_inputs`` is missing or no tuple.
        ValueError: the model is prepared or converted already, or not float32.
        RuntimeError: the model cannot be copied, or fails on the example inputs.
    """
    _check_model(model, "prepare")
    mapping = get_default_qconfig_mapping("x86") if mapping is None else mapping
    _check_mapping(mapping, "prepare")
    return prepare_model(model, mapping, _as_tuple(example_inputs), qat=False)


def prepare_qat(
    model: nn.Module,
    mapping: QConfigMapping | None = None,
    example_inputs: Any = None,
    *,
    on_nonfinite: str = "skip",
) -> nn.Module:
    """A copy of a float model that trains with quantization simulated (quantization-aware
    training).

    Weights and activations are fake-quantized, each as its ``TensorSpec.method`` says: with
    straight-through gradients (Jacob et al. 2018, section 3), or with scales that are learned.
    Every format of the table trains; those without an integer kernel stay simulated in float when
    the model is converted. Batch norms stay ordinary layers that see the statistics of the
    quantized network, and are folded by ``convert``. Parameters keep their names. The copy is in
    training mode; control flow that depends on the mode is traced as in evaluation. The model
    itself is not changed.

    Args:
        model: the float model, usually trained.
        mapping: how each layer is quantized; ``get_default_qat_qconfig_mapping("x86")`` if None.
        example_inputs: what ``model.forward`` takes, as a tuple.
        on_nonfinite: what activations with NaN or Inf do: "skip" leaves the ranges as they are,
            warns once for each module, and training goes on as it would in float; "error" raises
            ValueError that names the module.

    Raises:
        TypeError, RuntimeError: as ``prepare``.
        ValueError: as ``prepare``, and for another value of ``on_nonfinite``.
    """
    _check_model(model, "prepare_qat")
    mapping = get_default_qat_qconfig_mapping("x86") if mapping is None else mapping
    _check_mapping(mapping, "prepare_qat")
    if on_nonfinite not in ON_NONFINITE:
        raise ValueError(
            f"prepare_qat: on_nonfinite must be one of {ON_NONFINITE}, got {on_nonfinite!r}"
        )
    prepared = prepare_model(
        model, mapping, _as_tuple(example_inputs), qat=True, on_nonfinite=on_nonfinite
    )
    install_synchronizer(prepared)
    return prepared


def _check_mapping(mapping: Any, function: str) -> None:
    if not isinstance(mapping, QConfigMapping):
        raise TypeError(
            f"{function} needs a QConfigMapping as its second argument, such as "
            f'qt.get_default_qconfig_mapping("x86"); got {type(mapping).__name__}'
        )


def _is_converted(model: nn.Module) -> bool:
    report = get_report(model)
    return report is not None and report.converted


def _observers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if is_observer(module)]


def _call(model: nn.Module, batch: Any, inputs: int, device: torch.device | None) -> None:
    """Runs the model on a batch: inputs alone, (input, ..., label), or a dict of inputs."""

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    if isinstance(batch, Mapping):
        model(**{key: move(value) for key, value in dict_inputs(batch, model).items()})
    else:
        model(*(move(value) for value in model_inputs(batch, inputs)))


def calibrate(
    prepared: nn.Module,
    loader: Iterable[Any],
    max_batches: int | None = None,
    *,
    progress: bool = True,
) -> nn.Module:
    """Runs a prepared model on representative data, so that its observers see the activations.

    Under ``torch.distributed`` each rank runs it on its share of the data, and all have the ranges
    of all data at the end; the shares may differ in size.

    Args:
        prepared: the result of ``prepare`` (or ``prepare_qat``); it is changed and returned.
        loader: batches: tensors, tuples ``(input, label)``, or dicts that hold inputs by name;
            what is no argument of ``forward``, such as a label, is left out.
        max_batches: stop after so many.
        progress: show a progress bar.

    Raises:
        ValueError: the model is not prepared, there is no data, or a batch gives NaN or infinite
            activations (names the layer).
        TypeError: the loader or a batch is of another kind.
        RuntimeError: it failed on another rank, or the models of the ranks differ.
    """
    model = unwrapped(prepared)
    report = get_report(model)
    if report is None:
        raise ValueError("calibrate needs the result of qt.prepare")
    if _is_converted(model):
        raise ValueError("calibrate: this model is converted already; calibrate the prepared one")
    observers = _observers(model)
    device = next((p.device for p in model.parameters()), None)
    with (
        eval_mode(model),
        on_all_ranks("calibrate"),
        torch.no_grad(),
        activations_in_place(model),
    ):
        # A fake-quantize module observes in training only.
        for observer in observers:
            observer.train()
        batches = 0
        for batch in batch_bar(loader, max_batches, "calibrate", progress=progress):
            _call(model, batch, report.inputs, device)
            batches += 1
        if batches == 0:
            raise ValueError("calibrate got no data: the loader is empty")
    synchronize(model)
    for observer in observers:
        if isinstance(observer, FakeQuantize):
            observer.check_measured()
    return prepared


def convert(prepared: nn.Module) -> nn.Module:
    """The quantized model: layers that compute on 8-bit codes.

    Args:
        prepared: the result of ``prepare`` after ``calibrate``, or of ``prepare_qat`` after
        training.
            It is not changed. Parameters that are sharded over ranks (FSDP2) are gathered: then
            all ranks call this together.

    Returns:
        A copy in evaluation mode, made of ordinary modules with plain uint8 and int8 tensors.

    Raises:
        RuntimeError: the model is not calibrated; names the layer.
        ValueError: the model is not prepared, or activations were NaN or infinite; names the layer.
    """
    prepared = unwrapped(prepared)
    report = get_report(prepared)
    if report is None:
        message = "convert needs the result of qt.prepare or qt.prepare_qat"
        held = [name for name, m in prepared.named_modules() if get_report(m) is not None]
        if len(held) == 1:
            message += f"; this {type(prepared).__name__} holds one: pass its .{held[0]}"
        raise ValueError(message)
    if _is_converted(prepared):
        raise ValueError("convert: this model is converted already")
    with gathered(prepared):
        quantized = copy.deepcopy(prepared).eval()
    remove_synchronizer(quantized)
    report = copy.deepcopy(report)
    report.converted = True
    for name, module in list(graph_modules(quantized)):
        lower_graph(module, f"{name}." if name else "", report)
    set_report(quantized, report)
    for parameter in quantized.parameters():
        if parameter.is_leaf:  # those inside a TorchScript module are not
            parameter.requires_grad_(False)
    return quantized.eval()

"""torch.ao's FX mode: prepare, convert and fuse by example inputs."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.optimization import fuse

from qtoolkit import workflow
from qtoolkit.graph.modules import (
    called_module,
    graph_modules,
    innermost_module,
    keep_whole,
)
from qtoolkit.graph.patterns import pattern_of
from qtoolkit.graph.prepare import rewritten
from qtoolkit.graph.report import get_report
from qtoolkit.qconfig import QConfigMapping as Mapping
from qtoolkit.qconfig import canonical_type_name, same_type
from qtoolkit.quantization.backend_config import check_backend_config
from qtoolkit.quantization.custom_config import (
    ConvertCustomConfig,
    FuseCustomConfig,
    PrepareCustomConfig,
    as_config,
)
from qtoolkit.quantization.dynamic import replace_dynamic
from qtoolkit.quantization.eager import fill_uncalibrated
from qtoolkit.quantization.errors import UnsupportedError
from qtoolkit.quantization.qconfig_mapping import QConfigMapping
from qtoolkit.quantization.stubs import replace_foreign_stubs
from qtoolkit.quantization.translate import dynamic_layers, mapping_of, qconfig_of

# What is kept with a prepared model in its meta, which copies take along.
_PRESERVED = "qtoolkit_preserved"
_DYNAMIC = "qtoolkit_dynamic"


def fuse_fx(
    model: nn.Module,
    fuse_custom_config: FuseCustomConfig | dict[str, Any] | None = None,
    backend_config: Any = None,
) -> fx.GraphModule:
    """A traced copy of a model with batch norms folded into the layers before them.

    Args:
        model: in evaluation mode.
        fuse_custom_config: which attributes to keep.
        backend_config: see ``prepare_fx``.

    Raises:
        ValueError: the model is in training mode.
    """
    check_backend_config(backend_config)
    if model.training:
        raise ValueError("fuse_fx needs a model in evaluation mode: call model.eval() first")
    traced = fx.symbolic_trace(copy.deepcopy(model))
    fused = fuse(traced, no_trace=True)
    assert isinstance(fused, fx.GraphModule)
    _preserve(fused, model, as_config(FuseCustomConfig, fuse_custom_config).preserved_attributes)
    return fused


def prepare_fx(
    model: nn.Module,
    qconfig_mapping: Any,
    example_inputs: Any,
    prepare_custom_config: PrepareCustomConfig | dict[str, Any] | None = None,
    _equalization_config: Any = None,
    backend_config: Any = None,
) -> nn.Module:
    """A copy of a model that is ready for calibration; see ``qtoolkit.prepare``.

    Args:
        model: the float model; it is not changed.
        qconfig_mapping: of this package or torch.ao, a dict as torch.ao took earlier, or qtoolkit's
            own.
        example_inputs: what ``model.forward`` takes, as a tuple.
        prepare_custom_config: see ``PrepareCustomConfig``; one of torch.ao or a dict as well.
        _equalization_config: None; ``qtoolkit.algorithms`` has equalization.
        backend_config: None or one of ``qtoolkit.quantization.backend_config``, without effect.

    Raises:
        UnsupportedError: an argument or an observer has no counterpart.
        TypeError, ValueError, RuntimeError: as ``qtoolkit.prepare``.
    """
    if _equalization_config is not None:
        raise UnsupportedError(
            "prepare_fx: _equalization_config must be None; qtoolkit.quantize runs recipes with "
            "equalization"
        )
    return _prepare(
        model, qconfig_mapping, example_inputs, prepare_custom_config, backend_config, qat=False
    )


def prepare_qat_fx(
    model: nn.Module,
    qconfig_mapping: Any,
    example_inputs: Any,
    prepare_custom_config: PrepareCustomConfig | dict[str, Any] | None = None,
    backend_config: Any = None,
) -> nn.Module:
    """A copy of a model that trains with quantization simulated; see ``qtoolkit.prepare_qat``.

    Its parameters are copies too: make the optimizer afterwards. Arguments and errors are those of
    ``prepare_fx``.
    """
    return _prepare(
        model, qconfig_mapping, example_inputs, prepare_custom_config, backend_config, qat=True
    )


def _prepare(
    model: nn.Module,
    given: Any,
    example_inputs: Any,
    custom_config: Any,
    backend_config: Any,
    *,
    qat: bool,
) -> nn.Module:
    check_backend_config(backend_config)
    config = as_config(PrepareCustomConfig, custom_config)
    if isinstance(given, dict):
        given = QConfigMapping.from_dict(given)
    original, model = model, replace_foreign_stubs(copy.deepcopy(model))
    for name in config.non_traceable_module_names:
        keep_whole(model.get_submodule(name))
    for module in model.modules():
        if isinstance(module, tuple(config.non_traceable_module_classes)):
            keep_whole(module)
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    mapping = mapping_of(given, model)
    order = getattr(given, "module_name_object_type_order_qconfigs", None)
    if order:
        mapping = _with_order(mapping, order, model, example_inputs, qat=qat)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="set_module_name")
        step = workflow.prepare_qat if qat else workflow.prepare
        prepared = step(model, mapping, example_inputs)
    if isinstance(prepared, fx.GraphModule):
        _dequantize_inputs(prepared, config.input_quantized_indexes)
    _preserve(prepared, original, config.preserved_attributes)
    prepared.__dict__.setdefault("meta", {})[_DYNAMIC] = dynamic_layers(model, mapping)
    return prepared


def _with_order(
    mapping: Mapping,
    order: dict[tuple[str, Any, int], Any],
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    qat: bool,
) -> Mapping:
    """The mapping with the n-th calls of a type in a module, by their names in the graph."""
    wanted = [
        (scope, canonical_type_name(object_type), index, qconfig)
        for (scope, object_type, index), qconfig in order.items()
    ]
    seen: Counter[tuple[str, str]] = Counter()
    for prefix, module in graph_modules(rewritten(model, example_inputs, fold=not qat).model):
        for node in module.graph.nodes:
            called = called_module(node, module)
            if called is None or pattern_of(node, module) is None:
                continue
            kind = canonical_type_name(getattr(called, "op_name", type(called)))
            inside = innermost_module(node)
            scope = inside.rpartition(".")[0] if inside == str(node.target) else inside
            scope = f"{prefix}.{scope}" if prefix and scope else prefix or scope
            name = f"{prefix}.{node.target}" if prefix else str(node.target)
            for wanted_scope, wanted_kind, index, qconfig in wanted:
                known = wanted_scope == scope and same_type(wanted_kind, kind)
                if known and seen[scope, wanted_kind] == index:
                    mapping = mapping.set_module_name(name, qconfig_of(qconfig, name))
            for counted in {w[1] for w in wanted if same_type(w[1], kind)}:
                seen[scope, counted] += 1
    return mapping


def _dequantize_inputs(prepared: fx.GraphModule, indexes: list[int]) -> None:
    placeholders = [node for node in prepared.graph.nodes if node.op == "placeholder"]
    for index in indexes:
        node = placeholders[index]
        with prepared.graph.inserting_after(placeholders[-1]):
            call = prepared.graph.call_method("dequantize", (node,))
        node.replace_all_uses_with(call, lambda user, call=call: user is not call)
    prepared.recompile()


def _preserve(result: nn.Module, source: nn.Module, names: list[str]) -> None:
    values = {name: getattr(source, name) for name in names}
    for name, value in values.items():
        setattr(result, name, value)
    if isinstance(result, fx.GraphModule):
        result.meta[_PRESERVED] = values


def convert_fx(
    graph_module: nn.Module,
    convert_custom_config: ConvertCustomConfig | dict[str, Any] | None = None,
    _remove_qconfig: bool = True,
    qconfig_mapping: Any = None,
    backend_config: Any = None,
    keep_original_weights: bool = False,
) -> nn.Module:
    """The quantized model; see ``qtoolkit.convert``.

    A layer that no data has reached gets scale 1 and zero point 0, with a warning: a state dict may
    follow.

    Args:
        graph_module: the result of ``prepare_fx`` after calibration, or of ``prepare_qat_fx`` after
            training; it is not changed.
        convert_custom_config: see ``ConvertCustomConfig``; one of torch.ao or a dict as well.
        qconfig_mapping: None; give ``prepare_fx`` what stays in float.
        backend_config: see ``prepare_fx``.
        keep_original_weights: False.

    Raises:
        UnsupportedError: another value of an argument.
        ValueError: the model is not prepared.
    """
    check_backend_config(backend_config)
    config = as_config(ConvertCustomConfig, convert_custom_config)
    if qconfig_mapping is not None or keep_original_weights:
        raise UnsupportedError(
            "convert_fx: qconfig_mapping must be None and keep_original_weights False; keep layers "
            "in float by prepare_fx's qconfig_mapping"
        )
    if get_report(graph_module) is None:
        raise ValueError("convert_fx needs the result of prepare_fx or prepare_qat_fx")
    prepared = copy.deepcopy(graph_module)
    fill_uncalibrated(prepared)
    result = workflow.convert(prepared)
    replace_dynamic(result, getattr(graph_module, "meta", {}).get(_DYNAMIC, []))
    known = getattr(graph_module, "meta", {}).get(_PRESERVED, {})
    for name in config.preserved_attributes:
        setattr(result, name, known[name] if name in known else getattr(graph_module, name))
    return result


def convert_to_reference_fx(*args: Any, **kwargs: Any) -> None:
    """Raises UnsupportedError: ``qtoolkit.export`` writes models for other runtimes."""
    raise UnsupportedError(
        "there are no reference models: qtoolkit.export writes converted models for other runtimes"
    )

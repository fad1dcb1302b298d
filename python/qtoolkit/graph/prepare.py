"""Decides what is quantized and puts observers, or fake-quantize modules, where values become
codes."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import fx, nn

from qtoolkit.fake_quantize import FakeQuantize, make_fake_quantize
from qtoolkit.graph.capture import Capture, Uncaptured
from qtoolkit.graph.fuse_qat import fuse_qat
from qtoolkit.graph.idioms import find_channel_shuffles, find_layer_norms, split_padding
from qtoolkit.graph.modules import (
    called_module,
    free_name,
    graph_modules,
    innermost_module,
)
from qtoolkit.graph.normalize import (
    float_node,
    fold_batch_norms,
    functions_to_modules,
    read_directly,
    remove_identities,
    separate_shared_layers,
    settle_calls,
)
from qtoolkit.graph.notes import Note, change_note, note_of, qconfig_of, set_note
from qtoolkit.graph.patterns import Match, pattern_of
from qtoolkit.graph.patterns.branch import branch_spec
from qtoolkit.graph.patterns.weighted import set_submodule
from qtoolkit.graph.plain import not_plain
from qtoolkit.graph.report import FloatLayer, Report, set_report
from qtoolkit.graph.resizing import replace_upsample
from qtoolkit.graph.same_values import origin
from qtoolkit.graph.shapes import float_shape, propagate_shapes
from qtoolkit.graph.shared import SharedObserver, shared_ranges
from qtoolkit.nn.kernels import activation_without_kernel, is_half, weight_without_kernel
from qtoolkit.nn.qat.batch_norm import make_freezable
from qtoolkit.observers import Observer, make_observer
from qtoolkit.qconfig import QConfig, QConfigMapping, TensorSpec, matches_name


def rewritten(model: nn.Module, example_inputs: tuple[Any, ...], *, fold: bool) -> Capture:
    """A captured copy of the model in the form in which layers are found.

    Args:
        model: the float model.
        example_inputs: what its ``forward`` takes.
        fold: fold batch norms into the layers before them, and leave out what does nothing in
            evaluation.
    """
    capture = Capture(model, example_inputs)
    propagate_shapes(capture.model, example_inputs)
    for _, module in graph_modules(capture.model):
        settle_calls(module)
        find_channel_shuffles(module)
        find_layer_norms(module)
        replace_upsample(module)
        functions_to_modules(module)
        separate_shared_layers(module)
        split_padding(module)
    failure = capture.difference()
    if failure:
        capture.give_up(f"the rewritten graph {failure}")
    for _, module in graph_modules(capture.model):
        remove_identities(module, training=not fold)
        if fold:
            fold_batch_norms(module)  # after the comparison, as it rounds differently
    return capture


def prepare_model(
    model: nn.Module,
    mapping: QConfigMapping,
    example_inputs: tuple[Any, ...],
    *,
    qat: bool,
    on_nonfinite: str = "error",
) -> nn.Module:
    """A captured copy of the model with observers; see ``qtoolkit.prepare`` and ``prepare_qat``."""
    capture = rewritten(model, example_inputs, fold=not qat)
    captured = capture.model
    report = Report(
        inputs=len(example_inputs),
        uncaptured=[_as_float_layer(entry) for entry in capture.uncaptured],
        recipe=mapping.to_dict(),
    )
    seen: list[str] = []
    for name, module in list(graph_modules(captured)):
        _prepare_graph(module, f"{name}." if name else "", mapping, report, seen, qat=qat)
    _warn_of_unused_names(mapping, seen)
    if qat:
        for _, module in graph_modules(captured):
            fuse_qat(module)
        captured.train()
    for child in captured.modules():
        if isinstance(child, FakeQuantize):
            child.on_nonfinite = on_nonfinite
    set_report(captured, report)
    return captured


def _warn_of_unused_names(mapping: QConfigMapping, names: list[str]) -> None:
    for pattern, _ in mapping.module_names:
        if not any(matches_name(pattern, name) for name in names):
            warnings.warn(
                f"set_module_name({pattern!r}, ...) names no layer of this model that can be "
                "quantized",
                stacklevel=4,
            )


def _as_float_layer(entry: Uncaptured) -> FloatLayer:
    where = f" ({entry.location})" if entry.location else ""
    return FloatLayer(entry.name or "(model)", entry.kind, f"not traceable: {entry.reason}{where}")


def _assign_qconfigs(
    module: fx.GraphModule,
    prefix: str,
    mapping: QConfigMapping,
    report: Report,
    seen: list[str],
    *,
    qat: bool,
) -> None:
    """Notes on every module that can be quantized how it shall be."""
    for node in module.graph.nodes:
        called = called_module(node, module)
        pattern = pattern_of(node, module)
        if called is None or pattern is None:
            continue
        name = _layer_name(prefix, node, module)
        inside = prefix + innermost_module(node)
        seen += [name, inside]
        op_type = getattr(called, "op_name", type(called))
        qconfig = mapping.qconfig_for(name, op_type, inside=inside)
        reason = not_plain(called) or pattern.unsupported(called)
        if read_directly(str(node.target), module):
            reason = "forward reads its parameters itself"
        if qconfig is None or qconfig.activation is None:
            reason = "its qconfig keeps it in float"
        elif pattern.has_weight and qconfig.weight is None:
            reason = "its qconfig gives no weight format"
        elif reason is None and not qat:
            _check_observed(qconfig, name)
            reason = _reason_without_kernel(qconfig, has_weight=pattern.has_weight)
        shape = float_shape(node)
        if reason is None and shape is not None and pattern.dimensions not in (None, len(shape)):
            reason = f"its output has {len(shape)} dimensions, the kernel's {pattern.dimensions}"
        if reason is None and shape is None:
            reason = "the example inputs do not reach it, or its output is no float tensor"
        if reason is not None:
            qconfig = None
            report.floats.append(FloatLayer(name, type(called).__name__, reason))
        set_note(called, Note(name, float_node(node), qconfig))


def _layer_name(prefix: str, node: fx.Node, module: fx.GraphModule) -> str:
    # A graph of one call stands for the layer itself; see capture.
    alone = len(module.graph.nodes) == 3 and node.target == "module"
    return prefix[:-1] if alone and prefix else prefix + str(node.target)


def _reason_without_kernel(qconfig: QConfig, *, has_weight: bool) -> str | None:
    assert qconfig.activation is not None
    reason = activation_without_kernel(qconfig.activation)
    if reason is None and has_weight and qconfig.weight is not None:
        reason = weight_without_kernel(qconfig.weight)
    return reason


def _check_observed(qconfig: QConfig | None, name: str) -> None:
    """Post-training quantization has no training in which another method could learn."""
    for spec in () if qconfig is None else (qconfig.activation, qconfig.weight):
        if spec is not None and spec.method != "observed" and not is_half(spec):
            raise ValueError(
                f"prepare: {name} is to be quantized with method {spec.method!r}, which is for "
                'training: use qt.prepare_qat, or method "observed"'
            )


def find_matches(module: fx.GraphModule) -> list[Match]:
    """The layers that are to be quantized, in the order of the graph."""
    matches: list[Match] = []
    fused: set[fx.Node] = set()
    for node in module.graph.nodes:
        pattern = pattern_of(node, module)
        if pattern is None or node in fused:
            continue
        if qconfig_of(called_module(node, module)) is None:
            continue
        match = pattern.match(node, module, fused)
        if match is not None:
            matches.append(match)
            fused.update(match.nodes)
    return matches


def _drop_float_only(module: fx.GraphModule, report: Report, prefix: str) -> list[Match]:
    """The matches that are worth quantizing.

    A layer without a weight whose result is used in float only is left in float, and so is one that
    would have to quantize what a float layer made; that may leave the layers around it without a
    reason, so the search starts again.
    """
    while True:
        matches = find_matches(module)
        found = _first_float_only(matches, module)
        if found is None:
            return matches
        dropped, reason = found
        called = called_module(dropped, module)
        assert called is not None
        change_note(called, qconfig=None)
        report.floats.append(
            FloatLayer(prefix + str(dropped.target), type(called).__name__, reason)
        )


def _first_float_only(matches: list[Match], module: fx.GraphModule) -> tuple[fx.Node, str] | None:
    """A layer that is not worth quantizing, and why."""
    inputs = {match: [origin(node, module) for node in match.inputs] for match in matches}
    wanted = {node for nodes in inputs.values() for node in nodes}
    codes = {match.output for match in matches}
    for match in matches:
        if not match.needs_codes:
            codes.update(inputs[match])
    for match in reversed(matches):
        if match.output not in wanted and (match.residual or not match.pattern.float_output):
            # With a fused addition the layer itself stays: only the addition is given up.
            adds = [node for node in match.nodes if len(node.args) == 2] if match.residual else []
            return [*adds, match.anchor][0], "only float layers use its output"
        if match.needs_codes and not codes.issuperset(inputs[match]):
            return match.anchor, "a float layer makes its input"
    return None


def _prepare_graph(
    module: fx.GraphModule,
    prefix: str,
    mapping: QConfigMapping,
    report: Report,
    seen: list[str],
    *,
    qat: bool,
) -> None:
    _assign_qconfigs(module, prefix, mapping, report, seen, qat=qat)
    matches = _drop_float_only(module, report, prefix)

    specs, names = _values_to_quantize(module, matches, None if prefix else mapping.input_spec())

    for match in matches:
        anchor = called_module(match.anchor, module)
        assert anchor is not None
        change_note(anchor, float_node=float_node(match.output))
        qconfig = qconfig_of(anchor)
        assert qconfig is not None
        if qat:
            match.pattern.prepare_qat(match, module, qconfig)
    if qat:
        _make_batch_norms_freezable(module)

    groups = {node: node for node in specs}
    covered: set[fx.Node] = set()
    if not qat:
        origins = {node: origin(node, module) for match in matches for node in match.inputs}
        groups, covered = shared_ranges(matches, specs, origins, module)
    suffix = "fake_quantize" if qat else "observer"
    device = next((p.device for p in module.parameters()), None)
    observers: dict[fx.Node, nn.Module] = {}
    for node, spec in specs.items():
        group = groups[node]
        first = observers.get(group)
        if first is None:
            make = make_fake_quantize if qat else make_observer
            first = make(spec, names[group]).to(device).train(module.training)
            observers[group] = first
            _insert_observer(module, node, suffix, first)
        else:
            # One module for each value: a pickle gives a module that is called twice one name.
            assert isinstance(first, Observer)
            shared = SharedObserver(first, records=node not in covered)
            _insert_observer(module, node, suffix, shared)
    if not qat:
        _observe_branches(matches, module, device)
    module.graph.lint()
    module.recompile()


def _values_to_quantize(
    module: fx.GraphModule, matches: list[Match], inputs: TensorSpec | None
) -> tuple[dict[fx.Node, TensorSpec], dict[fx.Node, str]]:
    """Which values become codes, how, and what errors call them.

    A value is quantized as the layer that makes it says, or, where a float layer makes it, as the
    first layer that reads it says; placeholders as ``inputs`` says, if it is given.
    """
    specs: dict[fx.Node, TensorSpec] = {}
    names: dict[fx.Node, str] = {}
    made = {match.output: match for match in matches}
    for match in matches:
        for node in match.inputs:
            source = origin(node, module)
            note = note_of(called_module(made.get(source, match).anchor, module))
            assert note is not None
            assert note.qconfig is not None
            assert note.qconfig.activation is not None
            own = inputs if source.op == "placeholder" else None
            specs.setdefault(source, own or note.qconfig.activation)
            names.setdefault(source, note.source if source in made else f"{note.source} (input)")
    return specs, names


def _insert_observer(
    module: fx.GraphModule, node: fx.Node, suffix: str, observer: nn.Module
) -> None:
    """Puts an observer between a value and all that reads it."""
    child = free_name(module, f"{node.name}_{suffix}")
    module.add_submodule(child, observer)
    with module.graph.inserting_after(node):
        call = module.graph.call_module(child, (node,))
    for user in list(node.users):
        if user is not call:
            user.replace_input_with(node, call)


def _observe_branches(
    matches: list[Match], module: fx.GraphModule, device: torch.device | None
) -> None:
    """Puts an observer before every fused addition; see ``patterns.branch``."""
    for match in matches:
        if match.branch is None:
            continue
        note = note_of(called_module(match.anchor, module))
        assert note is not None
        assert note.qconfig is not None
        assert note.qconfig.activation is not None
        name = f"{note.source} (before the addition)"
        observer = make_observer(branch_spec(note.qconfig.activation), name).to(device)
        _insert_observer(module, match.branch, "observer", observer.train(module.training))
        if match.relu:
            _show_residual(match.branch)


def _show_residual(branch: fx.Node) -> None:
    """Gives the observer of the value before an addition what is added to it, too."""
    (observer,) = branch.users
    (addition,) = observer.users
    addition.prepend(observer)  # the other value may come after the branch
    observer.args = (branch, *(arg for arg in addition.args if arg is not observer))


def _make_batch_norms_freezable(module: fx.GraphModule) -> None:
    replaced: dict[int, nn.Module] = {}
    for name, child in list(module.named_modules()):
        new = make_freezable(child)
        if new is not child:
            set_submodule(module, name, new)
            replaced[id(child)] = new
    for child in module.modules():
        folded = getattr(child, "_batch_norm", ())
        if folded:
            child._batch_norm = tuple(replaced.get(id(norm), norm) for norm in folded)  # type: ignore


def is_observer(module: nn.Module | None) -> bool:
    """True for what ``prepare`` puts on activations."""
    return isinstance(module, Observer | FakeQuantize | SharedObserver)

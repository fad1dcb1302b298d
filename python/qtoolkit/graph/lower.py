"""Turns a calibrated or trained graph into one that computes on codes."""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch import fx, nn

from qtoolkit.fake_quantize import FakeQuantize
from qtoolkit.graph.fuse_qat import unfuse_qat
from qtoolkit.graph.modules import called_module, free_name
from qtoolkit.graph.notes import note_of
from qtoolkit.graph.patterns import Match
from qtoolkit.graph.prepare import find_matches, is_observer
from qtoolkit.graph.report import FloatLayer, Report
from qtoolkit.graph.same_values import IDENTITIES, asks_fact, keeps_values, lower_same_values
from qtoolkit.graph.shapes import float_shape
from qtoolkit.graph.shared import SharedObserver, readers
from qtoolkit.nn import qat
from qtoolkit.nn.base import QParams, QuantizedModule
from qtoolkit.nn.elementwise import Dequantize, Quantize
from qtoolkit.nn.kernels import activation_without_kernel, weight_without_kernel
from qtoolkit.nn.stubs import Stub
from qtoolkit.observers import Observer
from qtoolkit.observers.base import range_to_qparams
from qtoolkit.qconfig import QConfig


def observer_qparams(observer: nn.Module) -> QParams:
    """What an observer or fake-quantize module found for its activation.

    Raises:
        RuntimeError: it has seen no data; names the layer.
        ValueError: it has seen NaN or infinite values; names the layer.
    """
    assert isinstance(observer, Observer | FakeQuantize | SharedObserver)
    scale, zero_point = observer.calculate_qparams()
    return QParams(scale, zero_point, observer.spec.quant_min, observer.spec.quant_max)


class _Lowering:
    """One graph on its way from float to codes."""

    def __init__(self, module: fx.GraphModule, prefix: str, report: Report) -> None:
        self.module = module
        self.graph = module.graph
        self.prefix = prefix
        self.report = report
        #: The nodes whose value is codes, with their quantization.
        self.codes: dict[fx.Node, QParams] = {}
        self.dequantized: dict[fx.Node, fx.Node] = {}
        #: What stands for a node that is gone; matches name nodes of the graph as it was.
        self.replaced: dict[fx.Node, fx.Node] = {}
        #: The first quantized layer made of a weight.
        self.shared: dict[int, tuple[object, QuantizedModule]] = {}
        #: What observers found; a search costs milliseconds.
        self.found: dict[nn.Module, QParams] = {}
        #: The layer that each node anchors.
        self.anchors: dict[fx.Node, Match] = {}
        self.speaks_for_others = {
            child.observer for child in module.modules() if isinstance(child, SharedObserver)
        }

    def run(self) -> None:
        unfuse_qat(self.module)
        matches = {match.output: match for match in find_matches(self.module)}
        self.anchors = {match.anchor: match for match in matches.values()}
        inner = {node for match in matches.values() for node in match.nodes}
        for node in list(self.graph.nodes):
            if node in matches:
                self._lower_layer(matches[node])
            elif node in inner:
                continue
            elif is_observer(called_module(node, self.module)):
                self._lower_observer(node)
            elif isinstance(called_module(node, self.module), Stub):
                self._lower_stub(node)
            elif self._moves_codes(node):
                self._lower_same_values(node)
            elif not asks_fact(node):
                self._use_float_inputs(node)
        self.graph.eliminate_dead_code()
        self.module.delete_all_unused_submodules()
        self.graph.lint()
        self.module.recompile()

    def _moves_codes(self, node: fx.Node) -> bool:
        if not node.args or node.args[0] not in self.codes:
            return False
        # Of codes every part is codes; keeps_values needs shapes to know, which a pickle loses.
        return node.target is operator.getitem or keeps_values(node, self.module)

    def _replace(self, node: fx.Node, new: fx.Node) -> None:
        node.replace_all_uses_with(new)
        self.replaced[node] = new

    def _observer_after(self, node: fx.Node) -> fx.Node | None:
        """The call of an observer of a value, None without."""
        for user in node.users:  # an observer before an addition is shown the residual, too
            if user.args[:1] == (node,) and is_observer(called_module(user, self.module)):
                return user
        return None

    def _found_by(self, call: fx.Node) -> QParams:
        """``observer_qparams`` of the observer that a node calls."""
        observer = called_module(call, self.module)
        assert observer is not None
        if observer not in self.found:
            self.found[observer] = observer_qparams(observer)
        return self.found[observer]

    def _qparams_of(self, call: fx.Node) -> QParams:
        """The quantization of the value that an observer is called with.

        Where functions alone read it, codes are not spent on what they do not tell apart, such as
        values below -3 before hardswish. Training has settled that itself.
        """
        observer = called_module(call, self.module)
        found = self._found_by(call)
        if not isinstance(observer, Observer) or observer in self.speaks_for_others:
            return found
        if observer.pinned is not None:
            return found
        steps = torch.tensor([found.quant_min, found.quant_max]) - found.zero_point.cpu()
        low, high = (found.scale.cpu() * steps).tolist()
        bounds = []
        for reader in readers(call, self.module):
            match = self.anchors.get(reader)
            after = None if match is None else self._observer_after(match.output)
            if match is None or after is None:
                return found
            bounds.append(
                match.pattern.input_range(match, self.module, low, high, self._found_by(after))
            )
        narrow = min((b[0] for b in bounds), default=low), max((b[1] for b in bounds), default=high)
        if narrow == (low, high):
            return found
        least, greatest = torch.tensor(narrow, device=found.scale.device)
        scale, zero_point = range_to_qparams(least, greatest, observer.spec)
        return replace(found, scale=scale, zero_point=zero_point)

    def _reason_without_kernel(self, match: Match, qconfig: QConfig) -> str | None:
        """Why a layer cannot compute on codes, or None if it can."""
        if match.pattern.has_weight:
            assert qconfig.weight is not None
            reason = weight_without_kernel(qconfig.weight)
            if reason is not None:
                return reason
        # Every input passed an observer, see prepare; one with an integer kernel gives codes.
        if any(self.replaced.get(node, node) not in self.codes for node in match.inputs):
            return "its input is of a format without an integer kernel"
        call = self._observer_after(match.output)
        if call is None:
            return None
        observer = called_module(call, self.module)
        assert isinstance(observer, Observer | FakeQuantize | SharedObserver)
        return activation_without_kernel(observer.spec)

    def _simulate_layer(self, match: Match, source: str, reason: str) -> None:
        """Keeps a layer in float, its weight fake-quantized as in training."""
        layer = called_module(match.anchor, self.module)
        if isinstance(layer, qat.WEIGHTED):
            layer.quantized_weight()
            layer.weight_fake_quant.freeze()
        if isinstance(match.batch_norm, qat.BatchNorm1d | qat.BatchNorm2d):
            match.batch_norm.freeze()
        for node in match.nodes:
            self._dequantize_inputs(node)
        self._add_float_layer(source, type(layer).__name__, f"simulated in float: {reason}")

    def _lower_layer(self, match: Match) -> None:
        note = note_of(called_module(match.anchor, self.module))
        assert note is not None
        assert note.qconfig is not None
        reason = self._reason_without_kernel(match, note.qconfig)
        if reason is not None:
            self._simulate_layer(match, note.source, reason)
            return
        inputs = [self.replaced.get(node, node) for node in match.inputs]
        qparams = [self.codes[node] for node in inputs]
        observer = self._observer_after(match.output)
        output = None if observer is None else self._qparams_of(observer)
        if output is not None and not isinstance(
            called_module(observer, self.module), FakeQuantize
        ):
            output = match.pattern.output_qparams(match, self.module, qparams, output)
        # Without an observer the result is float32; a bound other than ReLU's stays a layer.
        last = match.output
        keep_bound = output is None and match.upper is not None
        lowered = match.pattern.lower(match, self.module, note.qconfig, qparams, output)
        assert isinstance(lowered, QuantizedModule)
        lowered.source = note.source
        lowered.float_node = note.float_node
        if keep_bound:
            lowered.relu = False
            lowered.float_node = ""
            self._add_float_layer(
                self.prefix + self._name_of(last), self._kind_of(last), "it clips a float output"
            )
        self._share_weight(called_module(match.anchor, self.module), lowered)
        name = str(match.anchor.target)
        self.module.set_submodule(name, lowered)
        with self.graph.inserting_before(last):
            call = self.graph.call_module(name, match.pattern.arguments(match, inputs))
        if keep_bound:
            last.args = (call,)
            doomed = match.nodes[:-1]
        else:
            self._replace(last, call)
            doomed = match.nodes
        for node in reversed(doomed):
            self.graph.erase_node(node)
        if output is not None:
            self.codes[call] = output

    def _share_weight(self, layer: nn.Module | None, lowered: QuantizedModule) -> None:
        """Lets the calls of one layer hold the same codes, so that they are saved once."""
        weight = getattr(layer, "weight", None)
        if weight is None or not hasattr(lowered, "weight_scale"):
            return
        # The weight is kept, so that its id stays its own.
        _, first = self.shared.setdefault(id(weight), (weight, lowered))
        for name in ("weight", "weight_scale"):
            if torch.equal(getattr(first, name), getattr(lowered, name)):
                setattr(lowered, name, getattr(first, name))

    def _lower_observer(self, node: fx.Node) -> None:
        value = node.args[0]
        assert isinstance(value, fx.Node)
        if value not in self.codes:
            observer = called_module(node, self.module)
            assert observer is not None
            if isinstance(observer, FakeQuantize) and activation_without_kernel(observer.spec):
                observer.calculate_qparams()  # raises what observer_qparams does
                observer.freeze()
                return
            qparams = self._qparams_of(node)
            quantize = Quantize(qparams)
            quantize.source = str(observer.name)
            name = free_name(self.module, f"{value.name}_quantize")
            self.module.add_submodule(name, quantize)
            with self.graph.inserting_before(node):
                call = self.graph.call_module(name, (value,))
            self.codes[call] = qparams
            value = call
        self._replace(node, value)
        self.graph.erase_node(node)
        # Here, because delete_all_unused_submodules overlooks a second name of a shared module.
        self.module.delete_submodule(str(node.target))

    def _lower_stub(self, node: fx.Node) -> None:
        self._dequantize_inputs(node)
        value = node.args[0]
        assert isinstance(value, fx.Node)
        self._replace(node, value)
        self.graph.erase_node(node)

    def _lower_same_values(self, node: fx.Node) -> None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        self.codes[node] = self.codes[source]
        if isinstance(called_module(node, self.module), IDENTITIES):
            self._replace(node, source)
            self.graph.erase_node(node)
            return
        lowered = lower_same_values(node, self.module, self.codes[source])
        if isinstance(lowered, str):
            node.target = lowered
        elif lowered is not None:
            if isinstance(lowered, QuantizedModule):
                lowered.source = self.prefix + str(node.target)
            name = free_name(self.module, node.name)
            self.module.add_submodule(name, lowered)
            node.target = name

    def _dequantize_inputs(self, node: fx.Node) -> bool:
        """Lets a node read codes as float32; returns whether it read any."""
        used = [arg for arg in node.all_input_nodes if arg in self.codes]
        for arg in used:
            node.replace_input_with(arg, self._dequantize(arg))
        return bool(used)

    def _use_float_inputs(self, node: fx.Node) -> None:
        """Dequantizes what a float layer or the output reads."""
        used = self._dequantize_inputs(node)
        if node.op == "output":
            self._make_outputs_contiguous(node)
        # A pickle loses the shapes; then a function is known to be of tensors by its input.
        computes = used or float_shape(node) is not None or node.op == "call_module"
        if node.op.startswith("call") and computes and not keeps_values(node, self.module):
            kind = self._kind_of(node)
            note = note_of(called_module(node, self.module))
            name = note.source if note is not None else self.prefix + self._name_of(node)
            self._add_float_layer(name, kind, f"no integer kernel for {kind}")

    def _make_outputs_contiguous(self, output: fx.Node) -> None:
        """Undoes channels-last at the border: the user's code may call ``view`` on a result."""
        for node in output.all_input_nodes:
            shape = float_shape(node)
            made_here = isinstance(called_module(node, self.module), QuantizedModule)
            if made_here or (shape is not None and len(shape) > 3):
                with self.graph.inserting_before(output):
                    output.replace_input_with(node, self.graph.call_method("contiguous", (node,)))

    def _dequantize(self, node: fx.Node) -> fx.Node:
        if node not in self.dequantized:
            name = free_name(self.module, f"{node.name}_dequantize")
            self.module.add_submodule(name, Dequantize(self.codes[node]))
            with self.graph.inserting_after(node):
                self.dequantized[node] = self.graph.call_module(name, (node,))
        return self.dequantized[node]

    def _name_of(self, node: fx.Node) -> str:
        return str(node.target) if node.op == "call_module" else node.name

    def _kind_of(self, node: fx.Node) -> str:
        called = called_module(node, self.module)
        if called is not None:
            return type(called).__name__
        return str(getattr(node.target, "__name__", node.target))

    def _add_float_layer(self, name: str, kind: str, reason: str) -> None:
        known = {layer.name for layer in self.report.floats + self.report.uncaptured}
        if name not in known:
            self.report.floats.append(FloatLayer(name, kind, reason))


def lower_graph(module: fx.GraphModule, prefix: str, report: Report) -> None:
    """Rewrites a prepared graph in place; ``report`` gets the layers that stay in float."""
    with torch.no_grad():
        _Lowering(module, prefix, report).run()

"""``quantize_weights``."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from qtoolkit.distributed import true_on_all_ranks
from qtoolkit.dynamic import leave_fast_paths
from qtoolkit.graph.report import FloatLayer, Report, get_report, set_report
from qtoolkit.nn.base import QuantizedModule
from qtoolkit.nn.weight_only import QuantizedWeight
from qtoolkit.progress import progress_bar
from qtoolkit.qconfig import matches_name
from qtoolkit.weight_only.calibration import Calibrator, as_batches
from qtoolkit.weight_only.cast import cast_model
from qtoolkit.weight_only.folding import fold_factor
from qtoolkit.weight_only.grid import Grid, make_grid
from qtoolkit.weight_only.layers import (
    TYPES,
    check_finite,
    make_layer,
    matrix_of,
    reason_for_float,
)
from qtoolkit.weight_only.loading import Source
from qtoolkit.weight_only.method import Inputs, Result, WeightMethod, make_weight_method
from qtoolkit.weight_only.resume import Finished, digest_of
from qtoolkit.weight_only.rtn import RoundToNearest

_CASTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
#: Formats whose groups have a size of their own.
_BLOCKS = ("mxfp4", "nvfp4")
_Patterns = tuple[str, ...] | None


def quantize_weights(
    model: nn.Module,
    format: str = "int4",
    group_size: int | None = 128,
    method: str = "rtn",
    data: Iterable[Any] | None = None,
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    types: Iterable[type[nn.Module]] = (nn.Linear, nn.Conv2d),
    symmetric: bool | None = None,
    options: Mapping[str, Any] | None = None,
    accumulate: str = "float32",
    max_batches: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> nn.Module:
    """A new model whose layers keep their weights as codes of few bits; activations stay float.

    The model itself is not changed, and not traced. The new one shares all parameters that are not
    quantized, is in evaluation mode, and may be quantized again where layers are left, with another
    format. Layers that share a weight still do; such a weight becomes codes only where all of them
    do, always by rounding to nearest. ``qt.explain`` says what became of each layer.

    Args:
        model: float32, float16 or bfloat16; of parameters on the meta device beside a
            ``checkpoint``.
        format: ``int8``, ``int6``, ``int5``, ``int4``, ``int3``, ``int2``, ``ternary``, ``binary``,
            ``nf4``, ``fp8``, ``mxfp4``, ``nvfp4``; ``fp16`` or ``bf16`` to cast what is no norm,
            for which of the other arguments only ``include`` and ``exclude`` count.
        group_size: how many neighbours in a row share a scale; None: a whole row. The last group
            of a row may be shorter. mxfp4 and nvfp4 have their own.
        method: ``rtn``, ``hqq``, or, with data, ``gptq``, ``awq``; see ``qtoolkit.weight_only``.
        data: batches of the model's inputs: tensors, tuples (labels are left out) or mappings.
            Under ``torch.distributed`` each rank gives its share, one batch at least, and all get
            the same codes, as from all data; the model must be the same on each.
        include: patterns of names, as in ``QConfigMapping.set_module_name``; only layers that match
            one, or lie in a module that does, are quantized. None: all.
        exclude: patterns of the layers that stay in float.
        types: of ``nn.Linear``, ``nn.Conv2d``, ``nn.Embedding``. Subclasses of them count where
            they compute the same.
        symmetric: integers without zero points; None: of 5 bits and more.
        options: of the method, by name.
        accumulate: of linear layers, ``"float32"`` for activations as they are, ``"int8"`` for
            activations rounded group by group, which is faster on CPUs with AVX-512 for integer
            and ternary formats.
        max_batches: how many batches of data are used; None: all.
        checkpoint: safetensors file, or folder of them, from which a model on the meta device is
            filled, one tensor at a time: the float model is never in memory. For methods without
            data. ``qtoolkit.weight_only.skeleton`` makes such models.
        resume: folder in which each finished layer is kept; a run that was interrupted takes them
            from there, if nothing that they depend on has changed.
        progress: show a bar.

    Raises:
        TypeError: ``model`` is no module, or an argument of a wrong type.
        ValueError: a format, method or option is unknown; a method needs data, or cannot be used
            with a checkpoint; a pattern matches no layer; no layer can be quantized; a weight or
            the input of a layer holds NaN or infinity (names the layer); the model fails on the
            data; the checkpoint lacks a tensor or has another shape; a file is damaged.
        FileNotFoundError: there is no checkpoint.
        RuntimeError: the model cannot be copied.
    """
    _check_model(model)
    if accumulate not in ("float32", "int8"):
        raise ValueError(
            f'quantize_weights: accumulate must be "float32" or "int8", got {accumulate!r}'
        )
    if group_size is not None and (isinstance(group_size, bool) or not isinstance(group_size, int)):
        raise TypeError(
            f"quantize_weights: group_size must be an integer or None, got {group_size!r}"
        )
    if group_size is not None and group_size < 1:
        raise ValueError(f"quantize_weights: group_size must be at least 1, got {group_size}")
    patterns = _as_patterns("include", include), _as_patterns("exclude", exclude) or ()
    if format in _CASTS:
        layers = {
            n: m
            for n, m in model.named_modules()
            if m._parameters or m._buffers or not any(m.children())
        }
        _check_patterns(patterns, layers, "layers")
        chosen = {n for n in layers if _choice(n, patterns) is None}
        return cast_model(model, _CASTS[format], chosen)
    grid = make_grid(format, None if format in _BLOCKS else group_size, symmetric)
    how = make_weight_method(method, options)
    if how.needs_data and checkpoint is not None:
        raise ValueError(
            f"quantize_weights: {method} runs the float model, which a checkpoint does not give; "
            "use rtn or hqq, or load the model"
        )
    if how.needs_data and data is None:
        raise ValueError(f"quantize_weights: {method} needs data, such as some batches of inputs")
    return _Run(
        model,
        grid,
        how,
        as_batches(data, model, max_batches) if how.needs_data and data is not None else [],
        patterns,
        tuple(types),
        accumulate,
        checkpoint,
        resume,
        progress,
    ).result()


@dataclass
class _Run:
    model: nn.Module
    grid: Grid
    method: WeightMethod
    batches: list[Any]
    patterns: tuple[_Patterns, _Patterns]
    types: tuple[type[nn.Module], ...]
    accumulate: str
    checkpoint: str | os.PathLike[str] | None
    resume: str | os.PathLike[str] | None
    progress: bool
    missed: list[str] = field(default_factory=list)
    outputs: set[str] = field(default_factory=set)

    def result(self) -> nn.Module:
        """The quantized model."""
        _check_types(self.types)
        report = Report(converted=True)
        chosen = self._choose(report)
        source = Source(self.model, self.checkpoint)
        self.new = _shallow_copy(self.model)
        self.new.eval()
        finished = None if self.resume is None else Finished(self.resume, self._depends())
        calibrator = None
        steps: list[list[str]] = [[name] for name in chosen]
        if self.batches:
            layers = {name: self.new.get_submodule(name) for name in chosen}
            calibrator = Calibrator(self.new, self.batches, layers)
            self.outputs = calibrator.outputs
            steps = calibrator.order
            reached = {name for step in steps for name in step}
            self.missed = [name for name in chosen if name not in reached]
            if self.missed:
                warnings.warn(
                    f"quantize_weights: the data never reaches {', '.join(self.missed)}; rounded "
                    "to nearest",
                    stacklevel=4,
                )
            steps = [*steps, *([name] for name in self.missed)]
        self.shared: dict[int, tuple[Result, QuantizedWeight]] = {}
        with torch.no_grad(), progress_bar(steps, "weights", progress=self.progress) as bar:
            for step in bar:
                self._step(step, source, calibrator, finished)
            source.fill(self.new)
        leave_fast_paths(self.new)
        set_report(self.new, report)
        return self.new

    def _depends(self) -> list[Any]:
        """What the codes of a layer follow from beside its name and weight: with data, all that
        its inputs do."""
        settings = [self.grid, self.method, digest_of(self.batches)]
        if self.method.needs_data:
            tensors = self.model.state_dict()
            settings += [digest_of([tensors]), self.patterns, self.types, self.accumulate]
        return settings

    def _choose(self, report: Report) -> list[str]:
        layers = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, self.types) and not isinstance(module, QuantizedModule)
        }
        _check_patterns(self.patterns, layers, "layers")
        reasons = {
            name: _choice(name, self.patterns) or reason_for_float(name, layer, self.model)
            for name, layer in layers.items()
        }
        # A weight that something else reads as numbers would be there twice.
        holders: dict[int, list[str]] = {}
        for name, module in self.model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    holders.setdefault(id(parameter), []).append(name)
        for name, layer in layers.items():
            for other in holders[id(layer.weight)]:
                if reasons[name] is None and reasons.get(other, "x") is not None:
                    reasons[name] = f"{other or 'the model'} shares its weight and stays in float"
        chosen = [name for name, reason in reasons.items() if reason is None]
        for name, reason in reasons.items():
            if reason is not None:
                report.floats.append(FloatLayer(name, type(layers[name]).__name__, reason))
        if not chosen:
            why = "; ".join(f"{f.name}: {f.reason}" for f in report.floats[:3])
            done = sum(isinstance(m, QuantizedModule) for m in self.model.modules())
            if not why:
                why = f"its {done} are quantized already" if done else "it has none"
            raise ValueError(f"quantize_weights: no layer can be quantized ({why})")
        self.counts = {name: len(holders[id(layer.weight)]) for name, layer in layers.items()}
        return chosen

    def _step(
        self,
        names: list[str],
        source: Source,
        calibrator: Calibrator | None,
        finished: Finished | None,
    ) -> None:
        layers = [self.new.get_submodule(name) for name in names]
        if any(self.counts[name] > 1 for name in names) and len(names) > 1:
            for name in names:
                self._step([name], source, calibrator, finished)
            return
        weights = []
        for name, layer in zip(names, layers):
            weight = source.read(name, layer, "weight")
            check_finite(weight, name)
            weights.append(weight)
        known = [finished and finished.load(n, w, self._grid(w)) for n, w in zip(names, weights)]
        results: list[Result]
        method, why = self._method_for(names[0], layers[0])
        done = all(result is not None for result in known)
        if true_on_all_ranks(done) if calibrator is not None else done:
            results = known  # type: ignore[assignment]
        else:
            inputs: Inputs | None = None
            if method.needs_data and calibrator is not None:
                inputs = calibrator.collect(names[0])
                if inputs is None:
                    raise ValueError(
                        f"quantize_weights: the data gives {names[0]} no rows; are all batches "
                        "empty?"
                    )
            results = self._quantize(method, weights, inputs, layers)
            if finished is not None:
                for name, weight, result in zip(names, weights, results):
                    finished.keep(name, weight, result)
        label = f"{method.name}{why}"
        for name, layer, weight, result in zip(names, layers, weights, results):
            source.fill_bias(name, layer)
            new = make_layer(layer, result, weight.dtype, label, self.accumulate)
            new.source = name
            if self.counts[name] > 1:
                _, first = self.shared.setdefault(id(layer.weight), (result, new))
                for key in ("codes", "scale", "zero_point", "table"):
                    new._buffers[key] = first._buffers[key]
            self._replace(layer, new)
        if calibrator is not None and results[0].input_factor is not None:
            fold_factor(self.new, names, calibrator)

    def _grid(self, weight: Tensor) -> Grid:
        columns = weight[0].numel()
        size = self.grid.group_size
        block = self.grid.format.block_size > 0
        return self.grid if block else replace(self.grid, group_size=min(size or columns, columns))

    def _method_for(self, name: str, layer: nn.Module) -> tuple[WeightMethod, str]:
        if not self.method.needs_data:
            return self.method, ""
        if name in self.missed:
            return RoundToNearest(), " (never reached)"
        if self.counts[name] > 1:
            return RoundToNearest(), " (shared)"
        if isinstance(layer, nn.Embedding):
            return RoundToNearest(), ""
        if isinstance(layer, nn.Conv2d):
            if layer.groups > 1:
                return RoundToNearest(), " (groups)"
            return self.method.for_convolution(), ""
        if name in self.outputs:
            return self.method.for_output(), ""
        return self.method, ""

    def _quantize(
        self,
        method: WeightMethod,
        weights: list[Tensor],
        inputs: Inputs | None,
        layers: list[nn.Module],
    ) -> list[Result]:
        known = self.shared.get(id(layers[0].weight))
        if known is not None:
            return [known[0]]
        matrices = [matrix_of(weight).float() for weight in weights]
        return method.quantize(matrices, self._grid(weights[0]), inputs)

    def _replace(self, old: nn.Module, new: nn.Module) -> None:
        for parent in list(self.new.modules()):
            for key, child in parent._modules.items():
                if child is old:
                    parent._modules[key] = new
        if self.new is old:
            self.new = new


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_weights needs a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("quantize_weights needs the Python module, not its TorchScript")
    own = [m for m in model.modules() if isinstance(m, QuantizedModule)]
    only_weights = all(isinstance(m, QuantizedWeight) for m in own)
    report = get_report(model)
    if report is not None and not (report.converted and only_weights):
        raise ValueError("quantize_weights: this model is prepared or converted already")


def _check_types(types: tuple[type[nn.Module], ...]) -> None:
    for cls in types:
        if not (isinstance(cls, type) and issubclass(cls, TYPES)):
            raise ValueError(
                f"quantize_weights: types must be of nn.Linear, nn.Conv2d and nn.Embedding, "
                f"got {cls!r}"
            )


def _as_patterns(option: str, given: str | Iterable[str] | None) -> _Patterns:
    if given is None:
        return None
    patterns = (given,) if isinstance(given, str) else tuple(given)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"quantize_weights: {option} must be patterns of names, got {given!r}")
    return patterns


def _check_patterns(
    patterns: tuple[_Patterns, _Patterns], layers: Iterable[str], what: str
) -> None:
    names = list(layers)
    for option, given in zip(("include", "exclude"), patterns):
        for pattern in given or ():
            if not any(matches_name(pattern, name) for name in names):
                raise ValueError(
                    f"quantize_weights: {option} pattern {pattern!r} matches none of the "
                    f"{len(names)} {what}"
                )


def _choice(name: str, patterns: tuple[_Patterns, _Patterns]) -> str | None:
    """Why the user keeps a layer in float, or None."""
    include, exclude = patterns
    if include is not None and not any(matches_name(pattern, name) for pattern in include):
        return "it is not included"
    if any(matches_name(pattern, name) for pattern in exclude or ()):
        return "it is excluded"
    return None


def _shallow_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares their tensors."""
    tensors = (*model.parameters(), *model.buffers())
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    except Exception as error:
        raise RuntimeError(
            f"quantize_weights: this {type(model).__name__} cannot be copied ({error})"
        ) from error

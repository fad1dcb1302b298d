"""Upsampling of images, in the ways that users write it."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn
from torch.nn import functional as torch_functional

from qtoolkit.graph.modules import called_module
from qtoolkit.graph.patterns.registry import AsModule
from qtoolkit.graph.plain import is_plain
from qtoolkit.graph.shapes import bind_any, float_shape
from qtoolkit.nn import functional

_KINDS = {
    "nearest": functional.UpsampleNearest2d,
    "nearest-exact": functional.UpsampleNearest2d,
    "bilinear": functional.UpsampleBilinear2d,
}


def _interpolate(
    x: Any,
    size: Any = None,
    scale_factor: Any = None,
    mode: Any = "nearest",
    align_corners: Any = None,
    recompute_scale_factor: Any = None,
    antialias: Any = False,
) -> None:
    """The parameters of ``F.interpolate``."""


def _make(
    size: Any, scale_factor: Any, mode: str, align_corners: Any, recompute: Any
) -> tuple[functional.Upsample2d, Any] | None:
    """The module for an interpolation, and the size to call it with (None where it has factors)."""
    if scale_factor is not None:
        factors = list(scale_factor) if isinstance(scale_factor, list | tuple) else scale_factor
        factors = factors if isinstance(factors, list) else [factors] * 2
        if size is not None or len(factors) != 2 or any(isinstance(f, fx.Node) for f in factors):
            return None
        factors = [float(factor) for factor in factors]
        return _KINDS[mode](mode, factors, bool(align_corners), bool(recompute)), None
    if isinstance(size, fx.Node):
        # A part of a shape, such as x.shape[-2:], is two numbers; what else it may be is not known.
        if size.target is not operator.getitem or not isinstance(size.args[1], slice):
            return None
    elif isinstance(size, int):
        size = [size] * 2
    elif size is None or len(size) != 2:
        return None
    return _KINDS[mode](mode, None, bool(align_corners)), size


def as_upsample(node: fx.Node, kind: type[functional.Upsample2d]) -> AsModule | None:
    """The module of a kind for a call of ``F.interpolate``, or None."""
    if node.target is not torch_functional.interpolate:
        return None
    arguments = bind_any(_interpolate, node)
    shape = float_shape(node.args[0]) if node.args else None
    if arguments is None or shape is None or len(shape) != 4 or arguments.pop("antialias"):
        return None
    if not isinstance(arguments["mode"], str) or _KINDS.get(arguments["mode"]) is not kind:
        return None
    made = _make(*arguments.values())
    if made is None:
        return None
    upsample, size = made
    return AsModule(upsample, node.args[:1] if size is None else (node.args[0], size))


def replace_upsample(module: fx.GraphModule) -> None:
    """Puts the toolkit's modules in place of ``nn.Upsample`` of images, which say no dimensions."""
    calls: dict[str, list[fx.Node]] = {}
    for node in module.graph.nodes:
        if is_plain(called_module(node, module), nn.Upsample):
            calls.setdefault(str(node.target), []).append(node)
    for name, nodes in calls.items():
        called = module.get_submodule(name)
        assert isinstance(called, nn.Upsample)
        shapes = [float_shape(node.args[0]) if node.args else None for node in nodes]
        images = all(shape is not None and len(shape) == 4 for shape in shapes)
        if not images or called.mode not in _KINDS:
            continue
        made = _make(
            called.size,
            called.scale_factor,
            called.mode,
            called.align_corners,
            called.recompute_scale_factor,
        )
        if made is None:
            continue
        upsample, size = made
        upsample.op_name = type(called)  # type: ignore[assignment]
        module.set_submodule(name, upsample.train(called.training))
        if size is not None:
            for node in nodes:
                node.args = (node.args[0], list(size))
    module.recompile()

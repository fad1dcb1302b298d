"""Values whose channels can be rescaled without changing what the network computes: divided where
they are made, multiplied into the weights that read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor, fx, nn

from qtoolkit.graph.modules import called_module, graph_modules
from qtoolkit.graph.normalize import folded_statistics, read_directly, set_folded_statistics
from qtoolkit.graph.patterns.fusing import relu_bound
from qtoolkit.graph.plain import is_plain
from qtoolkit.graph.prepare import is_observer
from qtoolkit.graph.same_values import IDENTITIES
from qtoolkit.graph.shapes import float_shape
from qtoolkit.nn import functional
from qtoolkit.nn.weights import swap_channels

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
_WEIGHTED = (*_CONVOLUTIONS, nn.Linear)
# f(a x) = a f(x) for a > 0, channel by channel.
_HOMOGENEOUS = (
    *IDENTITIES,
    nn.ReLU,
    nn.LeakyReLU,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    functional.GlobalAvgPool2d,
)


@dataclass(eq=False)
class Reader:
    """A layer whose weight reads a value.

    Attributes:
        path: dotted name in the prepared model.
        module: a convolution or linear layer.
        repeat: how many neighbouring inputs of it are one channel of the value (after flattening).
    """

    path: str
    module: Any
    repeat: int = 1

    def ranges(self, channels: int) -> Tensor:
        """The largest magnitude of the weights that read each channel."""
        return self._by_channel(channels).abs().amax(dim=1)

    def multiply(self, factor: Tensor) -> None:
        """Multiplies the weights that read each channel, in place."""
        weight = self.module.weight.data
        factor = factor.to(weight.dtype).repeat_interleave(self.repeat)
        if isinstance(self.module, nn.ConvTranspose2d):
            weight.mul_(factor.reshape(-1, 1, 1, 1))
            return
        groups = getattr(self.module, "groups", 1)
        grouped = weight.view(groups, weight.shape[0] // groups, *weight.shape[1:])
        shape = (groups, 1, weight.shape[1], *([1] * (weight.dim() - 2)))
        grouped.mul_(factor.reshape(shape))

    def _by_channel(self, channels: int) -> Tensor:
        """Its weights as [channels of the value, weights that read it]."""
        weight = self.module.weight.detach()
        if isinstance(self.module, nn.ConvTranspose2d):
            return weight.flatten(1)
        groups = getattr(self.module, "groups", 1)
        grouped = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        return grouped.transpose(1, 2).reshape(channels, -1)


@dataclass(eq=False)
class Link:
    """A value that one layer makes and layers with weights alone read.

    Attributes:
        path: dotted name of the layer that makes it, in the prepared model.
        maker: a convolution, a linear layer or a layer norm.
        readers: what reads it.
        channels: how many it has.
        first: the first output channel of ``maker`` that belongs to it.
        upper: the bound of a ReLU6 on the way, infinity without.
    """

    path: str
    maker: Any
    readers: list[Reader]
    channels: int
    first: int = 0
    upper: float = inf

    @property
    def is_norm(self) -> bool:
        """True for a layer norm."""
        return isinstance(self.maker, nn.LayerNorm)

    def made_ranges(self) -> Tensor:
        """The largest magnitude of the weights that make each channel."""
        weight = self.maker.weight.detach()
        if isinstance(self.maker, nn.ConvTranspose2d):
            weight = swap_channels(weight, self.maker.groups)
        return weight.reshape(weight.shape[0], -1).abs().amax(dim=1)[self._rows()]

    def read_ranges(self) -> Tensor:
        """The largest magnitude of the weights that read each channel."""
        ranges = [reader.ranges(self.channels) for reader in self.readers]
        return torch.stack(ranges).amax(dim=0)

    @torch.no_grad()
    def divide(self, scale: Tensor) -> None:
        """Divides the channels by a positive scale [channels]; what reads them makes up for it."""
        whole = torch.ones(self.maker.weight.shape[0], device=scale.device)
        if isinstance(self.maker, nn.ConvTranspose2d):
            whole = torch.ones(self.maker.out_channels, device=scale.device)
        whole[self._rows()] = scale.float()
        weight = self.maker.weight.data
        shape = (-1, *([1] * (weight.dim() - 1)))
        if isinstance(self.maker, nn.ConvTranspose2d):
            swapped = swap_channels(weight, self.maker.groups) / whole.reshape(shape)
            weight.copy_(swap_channels(swapped, self.maker.groups))
        else:
            weight.div_(whole.reshape(shape))
        if self.maker.bias is not None:
            self.maker.bias.data.div_(whole)
        known = folded_statistics(self.maker)
        if known is not None:
            set_folded_statistics(self.maker, known[0] / whole, known[1] / whole)
        for reader in self.readers:
            reader.multiply(scale)

    def _rows(self) -> slice:
        return slice(self.first, self.first + self.channels)


def find_links(prepared: nn.Module) -> list[Link]:
    """The values of a prepared model that can be rescaled, in the order of its graphs.

    A value that is added to another, or that anything but a layer with a weight reads, is none.
    Between maker and readers may stand functions with f(a x) = a f(x), pooling, flattening,
    changes of the order of dimensions, and a ReLU6, which is the caller's to respect.
    """
    found = []
    for prefix, graph in graph_modules(prepared):
        calls = Counter(
            id(called_module(node, graph).weight)  # type: ignore[union-attr]
            for node in graph.graph.nodes
            if is_plain(called_module(node, graph), (*_WEIGHTED, nn.LayerNorm))
        )
        for node in graph.graph.nodes:
            maker = called_module(node, graph)
            axis = _channel_axis(node, maker)
            if axis is None or not _is_free(node, maker, graph, calls):
                continue
            assert maker is not None
            link = Link(_path(prefix, node), maker, [], _channels(maker))
            if _follow(node, axis, 1, graph, prefix, link, calls) and link.readers:
                found.append(link)
    return found


def _path(prefix: str, node: fx.Node) -> str:
    return f"{prefix}.{node.target}" if prefix else str(node.target)


def _channels(maker: Any) -> int:
    if isinstance(maker, nn.ConvTranspose2d):
        return maker.out_channels
    return int(maker.weight.shape[0])


def _channel_axis(node: fx.Node, maker: nn.Module | None) -> int | None:
    """The dimension of a maker's output that its channels are; None for what is no maker."""
    shape = float_shape(node)
    if shape is None:
        return None
    if is_plain(maker, _CONVOLUTIONS):
        return 1
    if is_plain(maker, nn.Linear):
        return len(shape) - 1
    if is_plain(maker, nn.LayerNorm):
        assert isinstance(maker, nn.LayerNorm)
        if maker.elementwise_affine and len(maker.normalized_shape) == 1:
            return len(shape) - 1
    return None


def _is_free(
    node: fx.Node, module: nn.Module | None, graph: fx.GraphModule, calls: Counter[int]
) -> bool:
    """True if nothing else uses the module's weight."""
    alone = calls[id(module.weight)] == 1  # type: ignore[union-attr]
    return alone and not read_directly(str(node.target), graph)


def _follow(
    node: fx.Node,
    axis: int,
    repeat: int,
    graph: fx.GraphModule,
    prefix: str,
    link: Link,
    calls: Counter[int],
) -> bool:
    """Collects what reads a value into ``link.readers``; False if that rules the link out.

    Args:
        axis: the dimension of the value that its channels are.
        repeat: how many neighbours along it are one channel.
    """
    for user in node.users:
        called = called_module(user, graph)
        if is_plain(called, _WEIGHTED) and user.args[0] is node:
            wanted = 1 if is_plain(called, _CONVOLUTIONS) else len(_shape(node, graph) or ()) - 1
            if len(user.args) != 1 or axis != wanted or not _is_free(user, called, graph, calls):
                return False
            if repeat > 1 and not is_plain(called, nn.Linear):
                return False
            link.readers.append(Reader(_path(prefix, user), called, repeat))
            continue
        passed = _pass(user, graph, axis, repeat, link)
        if passed is None or not _follow(user, *passed, graph, prefix, link, calls):
            return False
    return True


def _shape(node: Any, graph: fx.GraphModule) -> tuple[int, ...] | None:
    """The shape of a value, also where an observer gives it."""
    while is_observer(called_module(node, graph)):
        node = node.args[0]
    return float_shape(node)


def _pass(
    user: fx.Node, graph: fx.GraphModule, axis: int, repeat: int, link: Link
) -> tuple[int, int] | None:
    """Axis and repeat behind an operator; None if a rescaled value does not pass it."""
    called = called_module(user, graph)
    before, after = _shape(user.args[0], graph), float_shape(user)
    if is_observer(called):
        return axis, repeat
    if before is None or after is None:
        return None
    if is_plain(called, _HOMOGENEOUS):
        return axis, repeat
    is_relu, upper = relu_bound(called)
    if is_relu and upper is not None:
        link.upper = min(link.upper, upper)
        return axis, repeat
    if isinstance(called, functional.Mean):
        gone = {dim % len(before) for dim in called.dims}
        if axis in gone:
            return None
        return axis - (0 if called.keepdim else sum(dim < axis for dim in gone)), repeat
    return _reordered(user, called, axis, repeat, before, after)


def _reordered(
    user: fx.Node,
    called: nn.Module | None,
    axis: int,
    repeat: int,
    before: tuple[int, ...],
    after: tuple[int, ...],
) -> tuple[int, int] | None:
    rest = user.args[1:]
    flattens = is_plain(called, nn.Flatten) or user.target in (torch.flatten, "flatten")
    if flattens and axis == 1 and repeat == 1 and len(after) == 2 and after[0] == before[0]:
        return 1, after[1] // before[1]
    if user.target in (torch.permute, "permute"):
        order: Any = rest[0] if len(rest) == 1 and isinstance(rest[0], list | tuple) else rest
        if all(isinstance(dim, int) for dim in order) and not user.kwargs:
            return [dim % len(before) for dim in order].index(axis), repeat
    if user.target in ("contiguous", "clone", "detach"):
        return axis, repeat
    return None


def attention_candidates(prepared: nn.Module) -> Iterator[Link]:
    """The values of attentions with the projections behind them, as far as their shapes tell.

    A channel of what attention gives is a sum of the same channel of the values, so the two
    projections can be rescaled like neighbours. Whether the graph in between is such an attention
    is for the caller to try out (``keeps_outputs``).
    """
    for prefix, graph in graph_modules(prepared):
        for node in graph.graph.nodes:
            reader = called_module(node, graph)
            if not is_plain(reader, nn.Linear) or not isinstance(node.args[0], fx.Node):
                continue
            assert isinstance(reader, nn.Linear)
            product = _back(node.args[0], graph)
            values = _operand(product, graph)
            if values is None:
                continue
            made = _back(values, graph)
            maker = called_module(made, graph)
            size = reader.in_features
            if is_plain(maker, nn.Linear) and maker.out_features in (size, 3 * size):  # type: ignore
                assert isinstance(maker, nn.Linear)
                first = maker.out_features - size
                readers = [Reader(_path(prefix, node), reader)]
                yield Link(_path(prefix, made), maker, readers, size, first)


def _back(node: fx.Node, graph: fx.GraphModule) -> fx.Node:
    """What made a value, before it was moved, cut or observed."""
    while True:
        called = called_module(node, graph)
        moved = (
            node.op in ("call_method", "call_function")
            and str(getattr(node.target, "__name__", node.target)) in _MOVES
        )
        if not (is_observer(called) or is_plain(called, IDENTITIES) or moved):
            return node
        if not node.args or not isinstance(node.args[0], fx.Node):
            return node
        node = node.args[0]


_MOVES = {
    *("reshape", "view", "flatten", "permute", "transpose", "contiguous", "squeeze", "unsqueeze"),
    *("unbind", "chunk", "split", "getitem", "select"),
}


def _operand(product: fx.Node, graph: fx.GraphModule) -> fx.Node | None:
    """The values that a product of attention weighs; None for what is no such product."""
    is_product = isinstance(called_module(product, graph), functional.Matmul)
    if is_product or product.target in (torch.matmul, torch.bmm, "matmul", "bmm"):
        operand = product.args[1] if len(product.args) == 2 else None
    elif product.target is nn.functional.scaled_dot_product_attention:
        operand = product.args[2] if len(product.args) > 2 else product.kwargs.get("value")
    else:
        return None
    return operand if isinstance(operand, fx.Node) else None

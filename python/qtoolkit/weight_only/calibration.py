"""What layers read when a model runs on calibration data."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from qtoolkit.distributed import is_distributed, on_all_ranks, sum_of_ranks
from qtoolkit.weight_only.method import Inputs

Batch = tuple[tuple[Any, ...], dict[str, Any]]


class _Reached(Exception):  # noqa: N818  (no error: it ends a run early)
    """The layer that a run was for has been called."""


def as_batches(data: Iterable[Any], model: nn.Module, max_batches: int | None) -> list[Batch]:
    """Arguments of the model's forward, positional and by name, for each batch.

    A batch is a tensor, a mapping by name, or a tuple, of which as many items count as forward
    takes: what follows are labels.

    Raises:
        TypeError: data is no iterable of batches.
        ValueError: there is none.
    """
    if isinstance(data, Tensor | str | Mapping) or not isinstance(data, Iterable):
        raise TypeError(
            "quantize_weights: data must be an iterable of batches, such as a DataLoader or a list "
            f"of tensors; got {type(data).__name__}"
        )
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"quantize_weights: max_batches must be at least 1, got {max_batches}")
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    taken = sum(k in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
                for k in kinds)  # fmt: skip
    most = None if inspect.Parameter.VAR_POSITIONAL in kinds else taken
    batches: list[Batch] = []
    for batch in data:
        if len(batches) == max_batches:
            break
        if isinstance(batch, Tensor):
            batches.append(((batch,), {}))
        elif isinstance(batch, Mapping):
            batches.append(((), dict(batch)))
        elif isinstance(batch, tuple | list) and batch:
            batches.append((tuple(batch)[:most], {}))
        else:
            raise TypeError(
                "quantize_weights: a batch of data must be a tensor, a tuple or a mapping by name, "
                f"got {type(batch).__name__}"
            )
    if not batches:
        raise ValueError("quantize_weights: data has no batch; it is empty or used up already")
    return batches


class Calibrator:
    """Runs a model, whose layers are replaced on the way, up to the layers that are asked for.

    Where the model is a chain of blocks (children of an ``nn.ModuleList`` or ``nn.Sequential``,
    each called once, on what the one before it gave and on what does not change), what a block
    reads is kept, and only that block runs again; it is kept for all batches, which takes the
    memory of one hidden state each.

    Under ``torch.distributed`` each rank has batches of its own, and all learn what all of them
    say; the model must be the same on each.

    Args:
        model: in eval mode.
        batches: as ``as_batches`` gives them.
        layers: by name in the model, those that will be asked for.

    Attributes:
        order: names of the layers that the data reaches, in the order of their first call. Those
            that read the same tensor stand together.
        producers: for a layer, the name of the norm whose output it reads, if it reads one.
        outputs: names of the layers whose output is what the model returns on the first batch.

    Raises:
        ValueError: the model fails on the data.
        RuntimeError: it fails on that of another rank, or the ranks' data reach other layers.
    """

    def __init__(
        self, model: nn.Module, batches: list[Batch], layers: Mapping[str, nn.Module]
    ) -> None:
        self._model, self._batches = model, batches
        self.order: list[list[str]] = []
        self.producers: dict[str, str] = {}
        self.outputs: set[str] = set()
        self._blocks = _blocks(model, layers)
        self._chain: list[str] = []
        self._position = -1
        self._kept: list[Batch] = []
        with on_all_ranks("quantize_weights"), _without_cache(model):
            self._explore(layers)
        if is_distributed():
            orders: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(orders, self.order)
            for rank, order in enumerate(orders):
                if order != orders[0]:
                    other = {n for step in order for n in step}
                    first = {n for step in orders[0] for n in step}
                    raise RuntimeError(
                        f"quantize_weights: the data of rank {rank} reaches other layers than that "
                        f"of rank 0, or in another order ({sorted(first ^ other)[:3]}); give each "
                        "rank data that reaches all, or exclude those layers"
                    )

    def _explore(self, layers: Mapping[str, nn.Module]) -> None:
        read: dict[str, Tensor] = {}  # holds the tensors, so that no two have the same id
        made: list[tuple[Tensor, str]] = []
        given: list[tuple[Tensor, str]] = []
        calls: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = []

        def on_output(name: str) -> Callable[..., None]:
            return lambda _, __, output: given.append((output, name))

        def on_layer(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                read.setdefault(name, _first(args, kwargs))

            return hook

        def on_norm(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                if isinstance(output, Tensor):
                    made.append((output, name))

            return hook

        def on_block(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                calls.append((name, args, kwargs, output))

            return hook

        with ExitStack() as on_layers:
            for name, layer in layers.items():
                handle = layer.register_forward_pre_hook(on_layer(name), with_kwargs=True)
                on_layers.callback(handle.remove)
            with ExitStack() as stack:
                for name, layer in layers.items():
                    stack.callback(layer.register_forward_hook(on_output(name)).remove)
                for name, module in self._model.named_modules():
                    if _is_norm(module):
                        stack.callback(module.register_forward_hook(on_norm(name)).remove)
                    if name in self._blocks:
                        handle = module.register_forward_hook(on_block(name), with_kwargs=True)
                        stack.callback(handle.remove)
                returned = list(tensors_of(self._call(0)))
            self.outputs = {n for t, n in given if any(t is r for r in returned)}
            for index in range(1, len(self._batches)):
                if len(read) == len(layers):
                    break
                self._call(index)  # layers that the first batch does not reach
        tensors: list[Tensor] = []
        for name, tensor in read.items():
            producer = next((n for t, n in made if t is tensor), None)
            if producer is not None:
                self.producers[name] = producer
            if tensors and tensor is tensors[-1] and isinstance(layers[name], nn.Linear):
                self.order[-1].append(name)
            else:
                self.order.append([name])
                tensors.append(tensor)
        if _is_chain(calls):
            self._chain = [name for name, *_ in calls]

    def _call(self, index: int) -> Any:
        args, kwargs = self._batches[index]
        try:
            with torch.no_grad():
                return self._model(*args, **kwargs)
        except _Reached:
            raise
        except Exception as error:
            shapes = [list(a.shape) for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            raise ValueError(
                f"quantize_weights: the model fails on batch {index} of data, of shapes {shapes}: "
                f"{error}"
            ) from error

    def replay(self, name: str, index: int) -> Any:
        """What the block of a layer, or the model, gives on a batch."""
        block = self._block_of(name)
        with _without_cache(self._model):
            if block is None:
                return self._call(index)
            self._advance(self._chain.index(block))
            args, kwargs = self._kept[index]
            with torch.no_grad():
                return self._model.get_submodule(block)(*args, **kwargs)

    def collect(self, name: str) -> Inputs | None:
        """What a layer reads; None where the data does not reach it.

        Raises:
            ValueError: it reads NaN, infinity, or what has no squares; the message names it.
            RuntimeError: it does on another rank.
        """
        layer: Any = self._model.get_submodule(name)
        total: list[Tensor] = []
        count = 0

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal count
            rows = _rows(layer, _first(args, kwargs))
            if not bool(torch.isfinite(rows).all()):
                raise ValueError(
                    f"quantize_weights: the input of {name} holds NaN or Inf on the data"
                )
            sums = rows.t() @ rows, rows.abs().sum(0)
            total[:] = [a + b for a, b in zip(total, sums)] if total else sums
            count += rows.size(0)

        handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
        # A layer that is called several times in a run is read at its first call alone.
        after = layer.register_forward_hook(_stop)
        try:
            with on_all_ranks("quantize_weights"):
                for index in range(len(self._batches)):
                    with suppress(_Reached):
                        self.replay(name, index)
        finally:
            handle.remove()
            after.remove()
        rows = float(sum_of_ranks([torch.tensor(count, dtype=torch.float64)])[0])
        if rows == 0:
            return None
        if not total:  # on the data of this rank
            columns, device = layer.weight[0].numel(), layer.weight.device
            total = [
                torch.zeros(columns, columns, device=device),
                torch.zeros(columns, device=device),
            ]
        moments, magnitude = sum_of_ranks(total)
        if not bool(torch.isfinite(moments).all()):
            raise ValueError(
                f"quantize_weights: the input of {name} is too large: its squares are no float32 "
                f"numbers, as its magnitudes are {float(magnitude.max() / rows):g} on average; "
                "check the data, or exclude the layer"
            )
        return Inputs(moments / rows, magnitude / rows, int(rows))

    def _block_of(self, name: str) -> str | None:
        found = [block for block in self._chain if name.startswith(f"{block}.") or name == block]
        return found[0] if found else None

    def _advance(self, position: int) -> None:
        """Keeps what the block at that position reads."""
        if self._position > position:
            self._position = -1
        if self._position < 0:
            self._kept = [self._first_inputs(i) for i in range(len(self._batches))]
            self._position = 0
        while self._position < position:
            block = self._model.get_submodule(self._chain[self._position])
            for index, (args, kwargs) in enumerate(self._kept):
                with torch.no_grad():
                    output = block(*args, **kwargs)
                self._kept[index] = ((_main(output), *args[1:]), kwargs)
            self._position += 1

    def _first_inputs(self, index: int) -> Batch:
        kept: list[Batch] = []

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept.append((args, kwargs))
            raise _Reached

        block = self._model.get_submodule(self._chain[0])
        handle = block.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            with suppress(_Reached):
                self._call(index)
        finally:
            handle.remove()
        return kept[0]


def _stop(*_: Any) -> None:
    raise _Reached


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def tensors_of(output: Any) -> Iterator[Tensor]:
    """The tensors of an output, those of a ``transformers`` model included."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from tensors_of(tuple(output.values()))
    elif isinstance(output, tuple | list):
        for item in output:
            yield from tensors_of(item)


def _main(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _rows(layer: nn.Module, x: Tensor) -> Tensor:
    """The rows that a layer's matrix multiplies, float32 ``[rows, K]``."""
    if isinstance(layer, nn.Conv2d):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = functional.pad(x.float(), layer._reversed_padding_repeated_twice, mode=mode)
        x = x if x.dim() == 4 else x[None]
        patches = functional.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride)
        return patches.movedim(1, -1).reshape(-1, patches.size(1))
    return x.detach().reshape(-1, x.size(-1)).float()


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return "norm" in type(module).__name__.lower() and weight is not None and weight.dim() == 1


def _blocks(model: nn.Module, layers: Mapping[str, nn.Module]) -> set[str]:
    """The outermost children of lists of modules that hold layers."""
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    blocks = set()
    for name in layers:
        inside = [prefix for prefix in lists if prefix == "" or name.startswith(f"{prefix}.")]
        if inside:
            prefix = min(inside, key=len)
            rest = name[len(prefix) + 1 :] if prefix else name
            child = rest.split(".")[0]
            blocks.add(f"{prefix}.{child}" if prefix else child)
    return blocks


def _is_chain(calls: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]]) -> bool:
    """Whether blocks ran once each, on the output of the one before and the same other inputs."""
    names = [name for name, *_ in calls]
    if len(names) < 2 or len(set(names)) < len(names):
        return False
    if len({name.rpartition(".")[0] for name in names}) > 1:
        return False
    _, first_args, first_kwargs, _ = calls[0]
    constant = (*first_args[1:], *first_kwargs.values())
    if not all(_is_constant(value) for value in constant):
        return False
    for (_, _, _, before), (_, args, kwargs, _) in itertools.pairwise(calls):
        if not args or args[0] is not _main(before) or kwargs.keys() != first_kwargs.keys():
            return False
        if len(args) != len(first_args):
            return False
        others = (*args[1:], *(kwargs[key] for key in first_kwargs))
        if not all(_same(a, b) for a, b in zip(others, constant)):
            return False
    return True


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_constant(item) for item in value)
    return value is None or isinstance(value, Tensor | bool | int | float | str)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Keeps a ``transformers`` model from filling a cache of keys and values."""
    config = getattr(model, "config", None)
    kept = getattr(config, "use_cache", None)
    if kept is not True:
        yield
        return
    config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        config.use_cache = True  # type: ignore[union-attr]

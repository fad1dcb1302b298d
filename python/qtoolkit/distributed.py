"""Training and calibration on several machines: what the ranks observed is made one.

Under ``torch.distributed`` every rank sees other data, so ranges and batch-norm statistics differ
from rank to rank. After each training step, and after ``calibrate``, all ranks exchange them in
one all-gather; each then computes the same merged state from the same bytes in the same order, and
converts to the same model bit for bit. Parameters are what DDP and FSDP synchronise.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.optim.swa_utils import AveragedModel

from qtoolkit.fake_quantize import FakeQuantize, ObservedFakeQuantize
from qtoolkit.observers import Observer
from qtoolkit.observers.base import range_to_qparams

_FSDP_ATTRIBUTES = ("__composable_api_state_key", "_fsdp_", "_is_fsdp_")
_CHILD = "qtoolkit_synchronizer"
_BatchNorm = nn.modules.batchnorm._BatchNorm
_BATCH_NORM_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_QPARAMS = ("scale", "zero_point")


def is_distributed() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def synchronize(model: nn.Module) -> None:
    """Makes observers and batch-norm statistics of a prepared model agree over all ranks.

    ``calibrate`` and each training step of a QAT model do so by themselves; call it on all ranks
    after forward passes of your own in evaluation mode. Does nothing in a single process.

    Ranges of all data become those of the data of all ranks, histograms their sum; moving averages
    and batch-norm statistics become the mean over the ranks. Frozen ranges stay.

    Raises:
        RuntimeError: the models of the ranks differ, or are switched differently; names a layer.
    """
    if is_distributed():
        _Exchange(_members(model)).run(check_layout=True)


class Synchronizer(nn.Module):
    """Synchronises the observers of a QAT model at the end of a forward pass in training mode.

    It is the last call in the graph of the model, or a forward hook where the model is no graph: a
    graph's copies and pickles have no hooks.
    """

    _is_impure = True  # torch.fx must not drop a call whose result nobody reads

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        # In a tuple, so that they are not registered a second time.
        self._members = (_members(model),)
        self._agreed: tuple[object, ...] = ()

    def forward(self, *_: Any) -> None:
        # Not in one expression with what Dynamo cannot see through: one process keeps one graph.
        if self.training and dist.is_available() and dist.is_initialized():
            self._synchronize()

    @torch.compiler.disable
    def _synchronize(self) -> None:
        if dist.get_world_size() == 1:
            return
        exchange = _Exchange(self._members[0])
        state = exchange.layout, exchange.flags
        exchange.run(check_layout=self._agreed[:1] != state[:1], check_flags=self._agreed != state)
        self._agreed = state

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_agreed": ()}  # what a copy belongs to must agree anew


def install_synchronizer(model: nn.Module) -> None:
    """Lets a QAT model synchronise at the end of each forward pass in training mode."""
    synchronizer = Synchronizer(model).train(model.training)
    if not isinstance(model, fx.GraphModule):
        model.register_forward_hook(_Hook(synchronizer))
        return
    model.add_submodule(_CHILD, synchronizer)
    output = next(node for node in model.graph.nodes if node.op == "output")
    with model.graph.inserting_before(output):
        model.graph.call_module(_CHILD, ())
    model.recompile()


def remove_synchronizer(model: nn.Module) -> None:
    """The reverse of ``install_synchronizer``; does nothing where there is none."""
    for key, hook in list(model._forward_hooks.items()):
        if isinstance(hook, _Hook):
            del model._forward_hooks[key]
    if isinstance(model, fx.GraphModule):
        for node in list(model.graph.nodes):
            if node.op == "call_module" and node.target == _CHILD:
                model.graph.erase_node(node)
                model.delete_submodule(_CHILD)
        model.recompile()


class _Hook:
    """A forward hook that copies of the model take along."""

    def __init__(self, synchronizer: Synchronizer) -> None:
        self.synchronizer = synchronizer

    def __call__(self, module: nn.Module, *_: Any) -> None:
        self.synchronizer.training = module.training
        self.synchronizer()


@contextmanager
def on_all_ranks(task: str) -> Iterator[None]:
    """Ranks do a task without waiting for each other; what fails on one fails on all.

    Raises:
        RuntimeError: the task failed on another rank; says on which and why.
    """
    if not is_distributed():
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    reports: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, report in enumerate(reports):
        if report is not None:
            raise RuntimeError(f"{task} failed on rank {rank}: {report}")


def true_on_all_ranks(value: bool) -> bool:
    """Whether it is true on every rank, which all ranks ask together."""
    if not is_distributed():
        return value
    values: list[bool | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return all(values)


def sum_of_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sums over all ranks, the same bits on each; the tensors themselves in one process."""
    if not is_distributed():
        return list(tensors)
    found = []
    for tensor in tensors:
        sent = tensor.to(_communication_device(tensor.device), copy=True)
        dist.all_reduce(sent)
        found.append(sent.to(tensor.device))
    return found


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within, the parameters of a sharded model (FSDP2, tensor parallel) are whole, and its modules
    are of their own classes, so that it can be copied. All ranks enter it together.
    """
    whole: dict[int, nn.Parameter] = {}

    def unsharded(parameter: Any) -> Any:
        if not hasattr(parameter, "full_tensor"):
            return parameter
        if id(parameter) not in whole:
            full = parameter.detach().full_tensor()
            whole[id(parameter)] = nn.Parameter(full, parameter.requires_grad)
        return whole[id(parameter)]

    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharding: tuple[type, ...] = () if fsdp is None else (fsdp.FSDPModule,)
    if not any(
        isinstance(module, sharding) or any(hasattr(p, "full_tensor") for p in module.parameters())
        for module in model.modules()
    ):
        yield
        return
    changed: list[tuple[nn.Module, type, dict[str, Any]]] = []
    try:
        for module in list(model.modules()):
            if isinstance(module, sharding):
                module.reshard()  # type: ignore[operator]
        for module in list(model.modules()):
            state = module.__dict__
            plain = {k: v for k, v in state.items() if not k.startswith(_FSDP_ATTRIBUTES)}
            plain["_parameters"] = {k: unsharded(p) for k, p in module._parameters.items()}
            for hooks in ("_forward_hooks", "_forward_pre_hooks"):
                own = [item for item in state[hooks].items() if not _is_of_torch(item[1])]
                plain[hooks] = type(state[hooks])(own)
            changed.append((module, type(module), state))
            object.__setattr__(module, "__dict__", plain)
            classes = (cls for cls in type(module).__mro__ if not issubclass(cls, sharding))
            object.__setattr__(module, "__class__", next(classes))
        yield
    finally:
        for module, cls, state in changed:
            object.__setattr__(module, "__class__", cls)
            object.__setattr__(module, "__dict__", state)


def _is_of_torch(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel, AveragedModel or
    ``torch.compile``."""
    dynamo = sys.modules.get("torch._dynamo")  # to import it takes a second
    compiled = () if dynamo is None else (dynamo.OptimizedModule,)
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel | AveragedModel):
            model = model.module
        elif isinstance(model, compiled):
            model = model._orig_mod
        else:
            return model


# --- what is exchanged ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Member:
    """A module whose state ranks share.

    Attributes:
        name: its dotted name.
        module: a batch norm, an observer, or a FakeQuantize that has its scale from elsewhere.
        quantizer: the FakeQuantize that takes its scale from the observer.
    """

    name: str
    module: nn.Module
    quantizer: FakeQuantize | None = None

    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors that are exchanged."""
        module = self.module
        if isinstance(module, FakeQuantize):
            # Learned from the first batch on: later DDP keeps them equal, and FSDP from the start.
            own = {**module._parameters, **module._buffers}
            return tuple(
                name
                for name, tensor in own.items()
                if tensor is not None and name != "_seen" and not hasattr(tensor, "full_tensor")
            )
        names = module._buffers if isinstance(module, Observer) else _BATCH_NORM_STATISTICS
        return tuple(name for name in names if getattr(module, name) is not None)

    def frozen(self) -> bool:
        """Whether the state is to stay as it is."""
        owner = self.owner()
        if owner is not None:
            return not owner.observing
        return isinstance(self.module, Observer) and not self.module.enabled

    def owner(self) -> FakeQuantize | None:
        """The FakeQuantize that the member is, or belongs to."""
        return self.module if isinstance(self.module, FakeQuantize) else self.quantizer

    def flags(self) -> tuple[bool, bool, bool]:
        """How the module is switched: frozen, whether it rounds, whether it has seen data."""
        owner = self.owner()
        if owner is not None:
            return not owner.observing, owner.fake_quantizing, owner.ready
        if isinstance(self.module, _BatchNorm):
            return not self.module.training, False, True
        return self.frozen(), False, True


def _members(model: nn.Module) -> list[_Member]:
    """The modules that are synchronised: a weight's range is a function of the weight."""
    members: list[_Member] = []
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantize):
            inside.update(module.modules())
            if module.is_weight:
                continue
            if isinstance(module, ObservedFakeQuantize):
                assert module.observer is not None
                members.append(_Member(name, module.observer, module))
            else:
                members.append(_Member(name, module))
        elif isinstance(module, Observer | _BatchNorm) and module not in inside:
            members.append(_Member(name, module))
    return [member for member in members if member.tensors()]


class _Exchange:
    """One exchange of the state of all members.

    Members of one class, with tensors of the same shapes and the same format, are stacked: the work
    does not grow with the number of layers.

    Attributes:
        layout: what every rank must have alike, in the order in which it is sent.
        flags: how the members are switched.
    """

    def __init__(self, members: Sequence[_Member]) -> None:
        groups: dict[tuple[object, ...], list[_Member]] = {}
        for member in members:
            module = member.module
            shapes = [(name, *_facts(getattr(module, name))) for name in member.tensors()]
            settings = module.settings() if isinstance(module, Observer) else {}
            role = member.quantizer is not None
            key = (type(module), *settings.items(), role, *shapes)
            groups.setdefault(key, []).append(member)
        self.groups = list(groups.values())
        self.members = [member for group in self.groups for member in group]
        self.layout = tuple(
            f"{member.name!r}: {key[0].__qualname__}, {', '.join(map(str, key[1:]))}"  # type: ignore
            for key, group in groups.items()
            for member in group
        )
        self.flags = tuple(member.flags() for member in self.members)

    @torch.no_grad()
    def run(self, *, check_layout: bool, check_flags: bool = True) -> None:
        """Exchanges and merges.

        Args:
            check_layout: compare the layouts of all ranks first, which takes a collective of its
                own; ranks of other layouts would wait for each other forever.
            check_flags: compare the flags, which on an accelerator waits for the device.
        """
        if check_layout:
            self._compare_layouts()
        if not self.members:
            return
        stacks = [
            torch.stack([getattr(member.module, name).detach() for member in group])
            for group in self.groups
            for name in group[0].tensors()
        ]
        flags = torch.tensor(self.flags, dtype=torch.uint8, device=stacks[0].device)
        received = _all_gather([flags, *stacks])
        everywhere = received.pop(0)
        if check_flags or everywhere.device.type == "cpu":
            self._compare_flags(everywhere.tolist())
        for group in self.groups:
            names = group[0].tensors()
            merged = _merge(group[0].module, {name: received.pop(0) for name in names})
            _store(group, merged)
        if not all(ready for _, _, ready in self.flags):
            self._share_readiness(everywhere[:, :, 2].amax(0).tolist())

    def _compare_layouts(self) -> None:
        layouts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(layouts, self.layout)
        for rank, layout in enumerate(layouts):
            if layout != layouts[0]:
                pairs = zip([*layouts[0], "nothing"], [*layout, "nothing"])
                first, other = next((a, b) for a, b in pairs if a != b)
                raise RuntimeError(
                    f"the models of rank 0 and rank {rank} are not quantized alike: rank 0 has "
                    f"{first} where rank {rank} has {other}; prepare the same model with the same "
                    "mapping on all ranks"
                )

    def _compare_flags(self, flags: list[list[list[int]]]) -> None:
        for rank, switches in enumerate(flags):
            for member, first, other in zip(self.members, flags[0], switches):
                if first[:2] != other[:2]:
                    raise RuntimeError(
                        f"{member.name!r} is {_described(first)} on rank 0 and {_described(other)} "
                        f"on rank {rank}: freeze and switch layers on all ranks at the same step"
                    )

    def _share_readiness(self, ready: list[int]) -> None:
        for member, anywhere in zip(self.members, ready):
            owner = member.owner()
            if owner is not None and anywhere:
                owner.ready = True


def _facts(tensor: Tensor) -> tuple[object, ...]:
    return tuple(tensor.shape), tensor.dtype


def _described(flags: Sequence[int]) -> str:
    return f"{'frozen' if flags[0] else 'not frozen'} and {'' if flags[1] else 'not '}rounding"


def _all_gather(tensors: list[Tensor]) -> list[Tensor]:
    """Each tensor of all ranks, [ranks, *shape], with one collective: bytes behind bytes."""
    device = tensors[0].device
    packed = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors])
    packed = packed.to(_communication_device(device))
    ranks = dist.get_world_size()
    everything = packed.new_empty(ranks * packed.numel())
    dist.all_gather_into_tensor(everything, packed)
    rows = everything.view(ranks, -1).to(device)
    parts = rows.split([tensor.numel() * tensor.element_size() for tensor in tensors], dim=1)
    # Cloned, as a view of another dtype must begin where such a number may.
    return [
        part.clone(memory_format=torch.contiguous_format)
        .view(tensor.dtype)
        .view(ranks, *tensor.shape)
        for part, tensor in zip(parts, tensors)
    ]


def _communication_device(device: torch.device) -> torch.device:
    """Where the default process group takes tensors from: here if it can."""
    group = dist.group.WORLD
    assert group is not None
    supported = [known.type for known in group._device_types]
    return device if device.type in supported else torch.device(supported[0])


def _merge(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of all ranks together: of each [ranks, members, *shape] one [members, *shape]."""
    if not isinstance(module, Observer):
        # In float64 the mean of equal numbers is that number. Batches are counted alike.
        return {
            name: values.double().mean(0).to(values.dtype)
            if values.is_floating_point()
            else values.amax(0)
            for name, values in state.items()
        }
    merged = type(module).merge_states(state)
    if merged.keys() != state.keys():
        raise NotImplementedError(
            f"{type(module).__name__}.merge_states must return all of {list(state)}, "
            f"got {list(merged)}"
        )
    return merged


def _store(group: list[_Member], merged: dict[str, Tensor]) -> None:
    """Gives every member that is not frozen its part, and its FakeQuantize what follows from it."""
    following = [not member.frozen() for member in group]
    chosen = [member for member, follows in zip(group, following) if follows]
    for name, values in merged.items():
        parts = [part for part, follows in zip(values.unbind(0), following) if follows]
        _copy([getattr(member.module, name) for member in chosen], parts)
    quantizers = [member.quantizer for member in chosen if member.quantizer is not None]
    if not quantizers:
        return
    observer = chosen[0].module
    assert isinstance(observer, Observer)
    scale, zero_point = (torch.stack([getattr(q, name) for q in quantizers]) for name in _QPARAMS)
    if type(observer).value_range is Observer.value_range:
        low, high = (
            torch.stack([getattr(member.module, name) for member in chosen])
            for name in ("min_val", "max_val")
        )
        new_scale, new_zero_point = range_to_qparams(low, high, observer.spec)
        # No batch so far could be observed: chosen on the device, as a branch would wait for it.
        seen = ~(low > high)
        scale = torch.where(seen, new_scale, scale)
        zero_point = torch.where(seen, new_zero_point, zero_point)
    else:
        for index, member in enumerate(chosen):
            assert isinstance(member.module, Observer)
            if member.module.calibrated():
                scale[index], zero_point[index] = member.module.calculate_qparams_unchecked()
    _copy([q.scale for q in quantizers], list(scale.unbind(0)))
    _copy([q.zero_point for q in quantizers], list(zero_point.unbind(0)))


def _copy(targets: list[Tensor], values: list[Tensor]) -> None:
    # Past autograd's versions: a backward pass that is still to come holds these tensors, without
    # need of the values that change here.
    if targets:
        torch._foreach_copy_([target.data for target in targets], values)

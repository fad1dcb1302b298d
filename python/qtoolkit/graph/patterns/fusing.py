"""What may follow a layer and be computed in its epilogue: batch norm, addition, ReLU."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from qtoolkit.graph.modules import called_module
from qtoolkit.graph.notes import qconfig_of
from qtoolkit.graph.plain import is_plain
from qtoolkit.nn import functional
from qtoolkit.observers import Observer


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that uses a value, None if there are several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def is_foldable(module: nn.Module | None) -> bool:
    """True for a batch norm that a layer before it can take in."""
    return (
        is_plain(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
        and module.running_var is not None  # type: ignore[union-attr]
    )


def relu_bound(module: nn.Module | None) -> tuple[bool, float | None]:
    """Whether a module is a ReLU that can be fused, and its upper bound."""
    if is_plain(module, nn.Hardtanh):  # nn.ReLU6 is one
        assert isinstance(module, nn.Hardtanh)
        return (True, float(module.max_val)) if module.min_val == 0 else (False, None)
    return is_plain(module, nn.ReLU), None


@dataclass
class Chain:
    """A layer and what follows it; nodes in ``taken`` belong to other layers."""

    nodes: list[fx.Node]
    taken: set[fx.Node]
    relu: bool = False
    upper: float | None = None
    batch_norm: nn.Module | None = None
    residual: fx.Node | None = None
    branch: fx.Node | None = None

    def _next(self) -> fx.Node | None:
        user = only_user(self.nodes[-1])
        return None if user in self.taken else user

    def follow_batch_norm(self, module: fx.GraphModule) -> None:
        """Takes in the batch norm after the last node."""
        user = self._next()
        called = called_module(user, module)
        if user is not None and is_foldable(called):
            self.nodes.append(user)
            self.batch_norm = called

    def follow_add(self, module: fx.GraphModule) -> None:
        """Takes in the addition of another tensor, if that addition is to be quantized, and the
        observer that ``prepare`` has put before it."""
        user, observers = self._next(), []
        if user is not None and isinstance(called_module(user, module), Observer):
            observers.append(user)
            user = only_user(user)
        called = called_module(user, module)
        if user is None or user in self.taken:
            return
        if not isinstance(called, functional.Add) or called.broadcast:
            return
        branch = [*self.nodes, *observers][-1]
        others = [arg for arg in user.args if arg is not branch]
        if qconfig_of(called) is None or len(others) != 1:
            return
        assert isinstance(others[0], fx.Node)
        self.nodes += [*observers, user]
        self.branch, self.residual = branch, others[0]

    def follow_relu(self, module: fx.GraphModule) -> None:
        """Takes in the ReLU after the last node."""
        user = self._next()
        is_relu, upper = relu_bound(called_module(user, module))
        if user is not None and is_relu:
            self.nodes.append(user)
            self.relu = True
            self.upper = upper

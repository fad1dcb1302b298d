"""Batch norm whose statistics can be frozen during quantization-aware training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qtoolkit.nn.sharing import keep_mark


class _FreezableBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm with a flag that keeps it in evaluation mode while the model trains.

    The flag is a buffer (uint8, which averaged copies of a model can hold), so a checkpoint of the
    training run keeps it; checkpoints of the float model, which lack it, load too.
    """

    frozen: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("frozen", torch.tensor(0, dtype=torch.uint8))

    def freeze(self, frozen: bool = True) -> None:
        """Uses the running statistics from now on and leaves them unchanged."""
        self.frozen.fill_(frozen)
        self.train(self.training or not frozen)

    def train(self, mode: bool = True) -> _FreezableBatchNorm:
        return super().train(mode and not bool(self.frozen))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        state_dict.setdefault(prefix + "frozen", self.frozen)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.train(self.training)


class BatchNorm1d(_FreezableBatchNorm, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` that can be frozen."""


class BatchNorm2d(_FreezableBatchNorm, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that can be frozen."""


_FREEZABLE: dict[type[nn.Module], type[_FreezableBatchNorm]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
}


def make_freezable(module: nn.Module) -> nn.Module:
    """The freezable batch norm with the same parameters and buffers, or the module itself."""
    kind = _FREEZABLE.get(type(module))
    if kind is None:
        return module
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    result = kind(
        module.num_features,
        eps=module.eps,
        momentum=module.momentum,
        affine=module.affine,
        track_running_stats=module.track_running_stats,
    )
    for name, parameter in module.named_parameters(recurse=False):
        setattr(result, name, parameter)
    for name, buffer in module.named_buffers(recurse=False):
        setattr(result, name, buffer)
    keep_mark(module, result)
    result.train(module.training)
    return result


def is_freezable(module: nn.Module) -> bool:
    """True for a batch norm that ``freeze`` works on."""
    return isinstance(module, _FreezableBatchNorm)

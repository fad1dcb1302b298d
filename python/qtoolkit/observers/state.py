"""What modules that hold quantization state have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

EXTRA_STATE = "_extra_state"
"""The key of a module's extra state in a state dict."""


class QuantizationState(nn.Module):
    """A module whose tensors are statistics or quantization parameters, not weights.

    - They keep their dtype when a model is converted with `.half()` or `.to(dtype)`.
    - A checkpoint that knows nothing of this module (that of the float model) loads with
      strict=True and leaves the state as it is.
    - Flags are Python bools, so that reading them costs no device synchronisation and no graph
      break; `flags` names them, and they travel in the state dict as one uint8 tensor.
    """

    flags: ClassVar[tuple[str, ...]] = ()
    resizable: ClassVar[tuple[str, ...]] = ()
    """Tensors whose shape is that of the data: [0] at first, taken from a loaded state dict."""

    def get_extra_state(self) -> Tensor:
        """The flags, uint8 [len(flags)]."""
        return torch.tensor([getattr(self, flag) for flag in self.flags], dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Restores the flags."""
        if state.numel() != len(self.flags):
            raise ValueError(
                f"{type(self).__name__}: expected {len(self.flags)} flags in the state, "
                f"got {state.numel()}"
            )
        for flag, value in zip(self.flags, state.tolist()):
            setattr(self, flag, bool(value))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        names = (*self._buffers, *self._parameters, EXTRA_STATE)
        if not any(prefix + name in state_dict for name in names):
            return
        for name in self.resizable:
            own, incoming = getattr(self, name, None), state_dict.get(prefix + name)
            if isinstance(own, Tensor) and isinstance(incoming, Tensor):
                if isinstance(own, nn.Parameter):
                    own.data = own.data.new_empty(incoming.shape)
                else:
                    own.resize_(incoming.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

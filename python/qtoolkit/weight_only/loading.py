"""Where the tensors of a model come from: the model itself, or files for one on the meta device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from qtoolkit.weight_only.shards import Shards


@contextmanager
def skeleton() -> Iterator[None]:
    """Inside, modules are made with parameters on the meta device, which have no memory, and with
    buffers as they are, since files hold those of tables seldom.

    For threads: modules that others make meanwhile are made so too.
    """

    def on_meta(_: nn.Module, __: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter.is_meta:
            return None
        moved = parameter.detach().to("meta")
        return nn.Parameter(moved, requires_grad=parameter.requires_grad)

    # PyTorch's annotation forgets the result.
    handle = register_module_parameter_registration_hook(on_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


class Source:
    """The tensors of a model by name.

    Args:
        model: the float model.
        checkpoint: the files to read, or None.

    Raises:
        ValueError: the model is on the meta device and there is no checkpoint, or a tensor is in
            neither or has another shape.
        FileNotFoundError: there is no checkpoint.
    """

    def __init__(self, model: nn.Module, checkpoint: str | os.PathLike[str] | None) -> None:
        self._shards = None if checkpoint is None else Shards(checkpoint)
        #: The names of each tensor of the model, of which a file may have one alone.
        self._names: dict[int, list[str]] = {}
        tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        tensors.update(model.named_buffers(remove_duplicate=False))
        for name, tensor in tensors.items():
            self._names.setdefault(id(tensor), []).append(name)
        meta = [name for name, tensor in tensors.items() if tensor.is_meta]
        if self._shards is None and meta:
            raise ValueError(
                f"quantize_weights: {meta[0]} and {len(meta) - 1} more tensors are on the meta "
                "device: give the checkpoint that has them"
            )
        self._read: dict[int, Tensor] = {}
        for name in meta:
            self._key(name, tensors[name])

    def read(self, prefix: str, layer: nn.Module, name: str) -> Tensor:
        """A parameter of a layer."""
        tensor = layer._parameters[name]
        assert tensor is not None
        if not tensor.is_meta or self._shards is None:
            return tensor.detach()
        full = f"{prefix}.{name}" if prefix else name
        return self._shards.read(self._key(full, tensor))

    def fill_bias(self, prefix: str, layer: nn.Module) -> None:
        """Reads the bias of a layer that is about to be replaced."""
        bias = layer._parameters.get("bias")
        if bias is not None and bias.is_meta:
            layer._parameters["bias"] = nn.Parameter(self.read(prefix, layer, "bias"))

    def fill(self, model: nn.Module) -> None:
        """Reads all that a copy of the model still has on the meta device."""
        for prefix, module in model.named_modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.is_meta:
                        tensors[name] = self._filled(f"{prefix}.{name}" if prefix else name, tensor)

    def _filled(self, name: str, tensor: Tensor) -> Tensor:
        assert self._shards is not None
        if id(tensor) not in self._read:
            read = self._shards.read(self._key(name, tensor))
            if isinstance(tensor, nn.Parameter):
                read = nn.Parameter(read, requires_grad=tensor.requires_grad)
            self._read[id(tensor)] = read
        return self._read[id(tensor)]

    def _key(self, name: str, tensor: Tensor) -> str:
        """The name in the files of a tensor on the meta device."""
        assert self._shards is not None
        found = [key for key in self._names.get(id(tensor), [name]) if key in self._shards]
        if not found:
            some = sorted(self._shards)[:3]
            raise ValueError(
                f"quantize_weights: {self._shards.path} has no tensor {name!r}; it has {some}. "
                "Buffers that no file holds are made by qtoolkit.weight_only.skeleton()"
            )
        entry = self._shards.entry(found[0])
        if entry.shape != tuple(tensor.shape):
            raise ValueError(
                f"quantize_weights: {found[0]!r} in {self._shards.path} has the shape "
                f"{list(entry.shape)}, the model needs {list(tensor.shape)}"
            )
        return found[0]

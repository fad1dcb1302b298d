"""Files that keep what a long run has done, so that the next one goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_VERSION = 1


class Checkpoint:
    """A JSON file with the state of a run; without a path it keeps nothing.

    Args:
        path: the file; None for none.
        identity: what the run is of, see ``fingerprint``.

    Raises:
        ValueError: the file is damaged, or is of another run; names it.
    """

    def __init__(self, path: str | os.PathLike[str] | None, identity: str) -> None:
        self.path = None if path is None else Path(path)
        self.identity = identity
        #: What was kept; empty at the beginning.
        self.state: dict[str, Any] = {}
        if self.path is None or not self.path.exists():
            return
        try:
            data = json.loads(self.path.read_text())
            version, known, state = data["version"], data["identity"], data["state"]
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
            raise ValueError(
                f"{self.path} is no checkpoint of qtoolkit ({error}): delete it, or name another"
            ) from error
        if version != _VERSION or known != identity:
            raise ValueError(
                f"{self.path} is of another run (another model, data or options): delete it, or "
                "name another"
            )
        self.state = state

    def save(self) -> None:
        """Writes the state; the file is whole at any time."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = {"version": _VERSION, "identity": self.identity, "state": self.state}
        part = self.path.with_name(f"{self.path.name}.part")
        part.write_text(json.dumps(data))
        os.replace(part, self.path)


def fingerprint(*parts: Any) -> str:
    """A hash of a model's parameters and buffers, of tensors, and of values that JSON can hold."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            digest.update(type(part).__qualname__.encode())
            for name, tensor in sorted(part.state_dict().items()):
                digest.update(name.encode())
                if isinstance(tensor, Tensor):
                    _add(digest, tensor)
        elif isinstance(part, Tensor):
            _add(digest, part)
        elif isinstance(part, list | tuple):
            digest.update(fingerprint(*part).encode())
        else:
            digest.update(json.dumps(part, sort_keys=True, default=repr).encode())
    return digest.hexdigest()


def _add(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

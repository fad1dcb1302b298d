"""What is raised for parts of torch.ao.quantization that have no counterpart here."""

from __future__ import annotations


class UnsupportedError(NotImplementedError):
    """A feature of torch.ao.quantization that qtoolkit does not have; names what to use."""

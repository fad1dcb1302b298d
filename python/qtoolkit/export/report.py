"""What an export tells of the file it wrote."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class ExportReport:
    """An exported file, and how it compares with the model it came from.

    Attributes:
        path: the file.
        size: bytes.
        verified: True if the file was loaded again and run on the example inputs.
        max_difference: largest absolute difference between the file's and the model's outputs; None
            if not verified.
        warnings: what the user should know.
    """

    path: Path
    size: int
    verified: bool
    max_difference: float | None
    warnings: list[str] = field(default_factory=list)

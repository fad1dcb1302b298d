"""What finished steps of a long run have decided, in a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

_FACTS = "run.json"


class RunFolder:
    """Keeps the state of every finished step of one run, a file each; a file is there whole or not
    at all.

    Args:
        folder: where; it is made if absent.
        facts: what the run depends on, by name. A folder of other facts is refused.

    Raises:
        ValueError: the folder belongs to another run, or holds other files; names what differs.
    """

    def __init__(self, folder: str | os.PathLike[str], facts: Mapping[str, Any]) -> None:
        self.path = Path(folder)
        self.prefix = ""
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / _FACTS
        facts = json.loads(json.dumps(dict(facts)))
        if file.is_file():
            try:
                known = dict(json.loads(file.read_text()))
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"resume: {file} is damaged ({error}); delete it") from error
            other = [key for key in sorted({*known, *facts}) if known.get(key) != facts.get(key)]
            if other:
                raise ValueError(
                    f"resume: {self.path} holds a run with another {', '.join(other)}; give an "
                    "empty folder, or delete this one to begin anew"
                )
        elif any(self.path.iterdir()):
            raise ValueError(f"resume: {self.path} holds other files; give an empty folder")
        else:
            self._replace(file, lambda path: path.write_text(json.dumps(facts, indent=1) + "\n"))

    def part(self, prefix: str) -> RunFolder:
        """The same folder for steps whose keys begin so."""
        part = RunFolder.__new__(RunFolder)
        part.path, part.prefix = self.path, f"{self.prefix}{prefix}-"
        return part

    def load(self, key: str) -> Any:
        """The state of a finished step, None if it is not finished.

        Raises:
            ValueError: its file is damaged; names it.
        """
        file = self._file(key)
        if not file.is_file():
            return None
        try:
            return torch.load(file, weights_only=True, map_location="cpu")
        except Exception as error:
            raise ValueError(f"resume: {file} is damaged ({error}); delete it") from error

    def save(self, key: str, state: Any) -> None:
        """Notes that a step is finished.

        Args:
            state: tensors, numbers, strings and None, in dicts and lists.
        """
        self._replace(self._file(key), lambda path: torch.save(state, path))

    def _file(self, key: str) -> Path:
        return self.path / f"{self.prefix}{key}.pt"

    def _replace(self, file: Path, write: Callable[[Path], object]) -> None:
        unfinished = file.with_suffix(".unfinished")
        write(unfinished)
        os.replace(unfinished, file)

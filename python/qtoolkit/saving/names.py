"""Names from files, which become part of the source text that torch.fx generates."""

from __future__ import annotations

import keyword
import re
import unicodedata
from typing import Any

from qtoolkit.saving.container import require

_WORD = re.compile(r"[\w /:+@=,-]{1,200}")


def is_name(name: Any) -> bool:
    """True for a name that a layer or tensor may have: ``conv1``, ``0``.

    Letters, digits and some signs, so that it is harmless both as an attribute and inside a
    string of generated source; and as Python normalizes it, so that both are the same attribute.
    """
    return (
        isinstance(name, str)
        and _WORD.fullmatch(name) is not None
        and not keyword.iskeyword(name)
        and not (name.startswith("__") and name.endswith("__"))
        and unicodedata.normalize("NFKC", name) == name
    )


def is_identifier(name: Any) -> bool:
    """True for a name that a variable of generated source may have; ``self`` is taken."""
    return is_name(name) and name.isidentifier() and name != "self"


def check_name(name: Any, what: str) -> str:
    """The name, if ``is_name``.

    Raises:
        InvalidFileError: it is none.
    """
    require(is_name(name), f"{str(name)[:80]!r} is no name of {what}")
    return name


def check_identifier(name: Any, what: str) -> str:
    """The name, if ``is_identifier``.

    Raises:
        InvalidFileError: it is none.
    """
    require(is_identifier(name), f"{str(name)[:80]!r} is no name of {what}")
    return name


def check_path(path: Any, what: str) -> list[str]:
    """The parts of a dotted name.

    Raises:
        InvalidFileError: it is none.
    """
    require(isinstance(path, str), f"{str(path)[:80]!r} is no name of {what}")
    return [check_name(part, what) for part in path.split(".")]

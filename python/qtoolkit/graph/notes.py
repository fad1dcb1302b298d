"""What ``prepare`` decides about a layer, kept on the layer's module until ``convert`` reads it.

On the module, not on the graph's node: nodes lose what is noted on them when a model is pickled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from qtoolkit.qconfig import QConfig

_ATTRIBUTE = "qtoolkit_note"


@dataclass(frozen=True)
class Note:
    """What is known of a layer.

    Attributes:
        source: its dotted name in the user's model.
        float_node: name of the node of the captured float graph that holds its output.
        qconfig: how it is quantized; None if it stays in float.
    """

    source: str
    float_node: str
    qconfig: QConfig | None


def note_of(module: nn.Module | None) -> Note | None:
    """The note on a module, None without."""
    return getattr(module, _ATTRIBUTE, None)


def set_note(module: nn.Module, note: Note) -> None:
    """Puts a note on a module."""
    setattr(module, _ATTRIBUTE, note)


def change_note(module: nn.Module, **changes: object) -> None:
    """Changes some fields of a module's note."""
    note = note_of(module)
    assert note is not None
    set_note(module, replace(note, **changes))  # type: ignore[arg-type]


def qconfig_of(module: nn.Module | None) -> QConfig | None:
    """How the layer is to be quantized; None if it is not."""
    note = note_of(module)
    return None if note is None else note.qconfig

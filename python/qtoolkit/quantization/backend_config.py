"""Backend configurations: qtoolkit finds layers by its own patterns, whatever they say."""

from __future__ import annotations

from typing import Any

from qtoolkit.quantization.errors import UnsupportedError

_KNOWN = ("", "native", "x86", "fbgemm", "qnnpack", "onednn")


class BackendConfig:
    """The name of a backend, without effect.

    Args:
        name: "native", "x86", "fbgemm", "qnnpack" or "onednn".
    """

    def __init__(self, name: str = "") -> None:
        self.name = name


def get_native_backend_config() -> BackendConfig:
    """The layers that qtoolkit knows."""
    return BackendConfig("native")


def get_fbgemm_backend_config() -> BackendConfig:
    """The layers that qtoolkit knows."""
    return BackendConfig("fbgemm")


def get_qnnpack_backend_config() -> BackendConfig:
    """The layers that qtoolkit knows."""
    return BackendConfig("qnnpack")


def get_onednn_backend_config() -> BackendConfig:
    """The layers that qtoolkit knows."""
    return BackendConfig("onednn")


def check_backend_config(given: Any) -> None:
    """Raises UnsupportedError for one that describes another backend; None is fine."""
    name = getattr(given, "name", None)
    if given is not None and name not in _KNOWN:
        raise UnsupportedError(
            f"backend_config must be None or one of {_KNOWN[1:]}, got {name or given!r}: qtoolkit "
            "finds layers by graph patterns (CONTRIBUTING.md); other runtimes are for "
            "qtoolkit.export"
        )

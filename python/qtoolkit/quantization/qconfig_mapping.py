"""QConfigMapping of torch.ao, which is changed in place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn

from qtoolkit.quantization.qconfig import (
    QConfigAny,
    get_default_qat_qconfig,
    get_default_qconfig,
)

ObjectType = type[nn.Module] | Callable[..., Any] | str

_KEYS = {
    "object_type": "set_object_type",
    "module_name_regex": "set_module_name_regex",
    "module_name": "set_module_name",
    "module_name_object_type_order": "set_module_name_object_type_order",
}


class QConfigMapping:
    """Which QConfig each part of a model gets; the ``set_`` methods return the mapping itself.

    Those named later go before those named earlier: global, object type, regular expression of the
    name, name, and the n-th call of an object type in a module.
    """

    def __init__(self) -> None:
        self.global_qconfig: QConfigAny = None
        self.object_type_qconfigs: OrderedDict[ObjectType, QConfigAny] = OrderedDict()
        self.module_name_regex_qconfigs: OrderedDict[str, QConfigAny] = OrderedDict()
        self.module_name_qconfigs: OrderedDict[str, QConfigAny] = OrderedDict()
        self.module_name_object_type_order_qconfigs: OrderedDict[
            tuple[str, ObjectType, int], QConfigAny
        ] = OrderedDict()

    def set_global(self, global_qconfig: QConfigAny) -> QConfigMapping:
        """For all that nothing else names."""
        self.global_qconfig = global_qconfig
        return self

    def set_object_type(self, object_type: ObjectType, qconfig: QConfigAny) -> QConfigMapping:
        """For a class of modules, a function, or the name of a method."""
        self.object_type_qconfigs[object_type] = qconfig
        return self

    def set_module_name_regex(self, module_name_regex: str, qconfig: QConfigAny) -> QConfigMapping:
        """For modules whose name begins with a match; the first expression that matches counts."""
        self.module_name_regex_qconfigs[module_name_regex] = qconfig
        return self

    def set_module_name(self, module_name: str, qconfig: QConfigAny) -> QConfigMapping:
        """For a module and what it holds."""
        self.module_name_qconfigs[module_name] = qconfig
        return self

    def set_module_name_object_type_order(
        self, module_name: str, object_type: ObjectType, index: int, qconfig: QConfigAny
    ) -> QConfigMapping:
        """For the call number ``index``, from 0, of an object type in a module."""
        self.module_name_object_type_order_qconfigs[module_name, object_type, index] = qconfig
        return self

    def to_dict(self) -> dict[str, Any]:
        """The settings as ``from_dict`` takes them."""
        return {
            "": self.global_qconfig,
            "object_type": list(self.object_type_qconfigs.items()),
            "module_name_regex": list(self.module_name_regex_qconfigs.items()),
            "module_name": list(self.module_name_qconfigs.items()),
            "module_name_object_type_order": [
                (*key, value) for key, value in self.module_name_object_type_order_qconfigs.items()
            ],
        }

    @classmethod
    def from_dict(cls, qconfig_dict: dict[str, Any]) -> QConfigMapping:
        """A mapping from ``{"": qconfig, "object_type": [(nn.Linear, qconfig), ...], ...}``.

        Raises:
            ValueError: it has another key.
        """
        unknown = [key for key in qconfig_dict if key not in ("", *_KEYS)]
        if unknown:
            raise ValueError(f"qconfig_dict has unknown keys {unknown}; use {['', *_KEYS]}")
        mapping = cls().set_global(qconfig_dict.get(""))
        for key, method in _KEYS.items():
            for entry in qconfig_dict.get(key, []):
                getattr(mapping, method)(*entry)
        return mapping

    def __repr__(self) -> str:
        return f"QConfigMapping({self.to_dict()})"


def get_default_qconfig_mapping(backend: str = "x86", version: int = 0) -> QConfigMapping:
    """``get_default_qconfig`` for the whole model."""
    return QConfigMapping().set_global(get_default_qconfig(backend, version))


def get_default_qat_qconfig_mapping(backend: str = "x86", version: int = 1) -> QConfigMapping:
    """``get_default_qat_qconfig`` for the whole model."""
    return QConfigMapping().set_global(get_default_qat_qconfig(backend, version))

"""Custom configurations of torch.ao's FX mode: what applies here, and what is refused."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn, TypeVar

from torch import nn

from qtoolkit.quantization.errors import UnsupportedError

_Config = TypeVar("_Config", bound="_CustomConfig")


def _refuse(what: str) -> NoReturn:
    raise UnsupportedError(
        f"{what} is not supported: keep the module in float with QConfigMapping.set_module_name("
        "name, None) or set_non_traceable_module_names, or write a graph pattern (CONTRIBUTING.md)"
    )


class _CustomConfig:
    """Reads and writes dicts; ``_keys`` gives the attribute for each key."""

    _keys: ClassVar[dict[str, str]] = {}
    _refused: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        for name in self._keys.values():
            setattr(self, name, [])

    @classmethod
    def from_dict(cls: type[_Config], given: dict[str, Any]) -> _Config:
        """The configuration that a dict of torch.ao's keys describes.

        Raises:
            UnsupportedError: it has a key that is not supported here.
            ValueError: it has an unknown key.
        """
        result = cls()
        for key, value in given.items():
            if key in cls._refused:
                if value:
                    _refuse(key)
            elif key in cls._keys:
                setattr(result, cls._keys[key], list(value))
            else:
                raise ValueError(f"unknown key {key!r}; use one of {list(cls._keys)}")
        return result

    def to_dict(self) -> dict[str, Any]:
        """The settings that are not empty."""
        return {key: getattr(self, name) for key, name in self._keys.items() if getattr(self, name)}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.to_dict()})"


class PrepareCustomConfig(_CustomConfig):
    """For ``prepare_fx`` and ``prepare_qat_fx``.

    Attributes:
        non_traceable_module_names, non_traceable_module_classes: modules that are not looked into
            and stay in float.
        input_quantized_indexes: inputs that may be quantized tensors of PyTorch; they are
            dequantized first.
        output_quantized_indexes: accepted; outputs are float tensors.
        preserved_attributes: attributes that the prepared model gets too.
    """

    _keys: ClassVar[dict[str, str]] = {
        "non_traceable_module_name": "non_traceable_module_names",
        "non_traceable_module_class": "non_traceable_module_classes",
        "input_quantized_idxs": "input_quantized_indexes",
        "output_quantized_idxs": "output_quantized_indexes",
        "preserved_attributes": "preserved_attributes",
    }
    _refused = (
        "standalone_module_name",
        "standalone_module_class",
        "float_to_observed_custom_module_class",
    )
    non_traceable_module_names: list[str]
    non_traceable_module_classes: list[type[nn.Module]]
    input_quantized_indexes: list[int]
    output_quantized_indexes: list[int]
    preserved_attributes: list[str]

    def set_non_traceable_module_names(self, names: list[str]) -> PrepareCustomConfig:
        """Modules, by name, that stay in float as they are."""
        self.non_traceable_module_names = names
        return self

    def set_non_traceable_module_classes(
        self, classes: list[type[nn.Module]]
    ) -> PrepareCustomConfig:
        """Modules, by class, that stay in float as they are."""
        self.non_traceable_module_classes = classes
        return self

    def set_input_quantized_indexes(self, indexes: list[int]) -> PrepareCustomConfig:
        """Inputs that may be quantized tensors of PyTorch."""
        self.input_quantized_indexes = indexes
        return self

    def set_output_quantized_indexes(self, indexes: list[int]) -> PrepareCustomConfig:
        """Accepted; outputs are float tensors, whose ``dequantize()`` gives themselves."""
        self.output_quantized_indexes = indexes
        return self

    def set_preserved_attributes(self, attributes: list[str]) -> PrepareCustomConfig:
        """Attributes of the model that the prepared one gets too."""
        self.preserved_attributes = attributes
        return self

    def set_float_to_observed_mapping(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises UnsupportedError."""
        _refuse("set_float_to_observed_mapping")

    def set_standalone_module_name(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises UnsupportedError."""
        _refuse("set_standalone_module_name")

    def set_standalone_module_class(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises UnsupportedError."""
        _refuse("set_standalone_module_class")


class ConvertCustomConfig(_CustomConfig):
    """For ``convert_fx``.

    Attributes:
        preserved_attributes: attributes of the prepared model that the converted one gets too.
    """

    _keys: ClassVar[dict[str, str]] = {"preserved_attributes": "preserved_attributes"}
    _refused = ("observed_to_quantized_custom_module_class",)
    preserved_attributes: list[str]

    def set_preserved_attributes(self, attributes: list[str]) -> ConvertCustomConfig:
        """Attributes of the prepared model that the converted one gets too."""
        self.preserved_attributes = attributes
        return self

    def set_observed_to_quantized_mapping(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises UnsupportedError."""
        _refuse("set_observed_to_quantized_mapping")


class FuseCustomConfig(_CustomConfig):
    """For ``fuse_fx``.

    Attributes:
        preserved_attributes: attributes of the model that the fused one gets too.
    """

    _keys: ClassVar[dict[str, str]] = {"preserved_attributes": "preserved_attributes"}
    preserved_attributes: list[str]

    def set_preserved_attributes(self, attributes: list[str]) -> FuseCustomConfig:
        """Attributes of the model that the fused one gets too."""
        self.preserved_attributes = attributes
        return self


def as_config(cls: type[_Config], given: Any) -> _Config:
    """A configuration from one of ours, one of torch.ao's, a dict or None.

    Raises:
        UnsupportedError: it asks for what is not supported here.
    """
    if given is None:
        return cls()
    if isinstance(given, cls):
        return given
    return cls.from_dict(given if isinstance(given, dict) else given.to_dict())

"""What a method of quantizing weights gets and gives, and the table of methods by name."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from qtoolkit.weight_only.grid import Coded, Grid


@dataclass(frozen=True)
class Inputs:
    """What calibration data says of the input of layers.

    Attributes:
        hessian: float32 ``[K, K]``, the mean of ``x x^T`` over the rows x of the input.
        magnitude: float32 ``[K]``, the mean of |x|.
        rows: how many there were.
    """

    hessian: Tensor
    magnitude: Tensor
    rows: int


@dataclass(frozen=True)
class Result:
    """A layer's codes.

    Attributes:
        coded: of the weight, or of the weight divided by ``input_factor`` column by column.
        input_factor: float32 ``[K]``, what the input is to be multiplied by, or None.
    """

    coded: Coded
    input_factor: Tensor | None = None

    def dequantized(self) -> Tensor:
        """The weight that the layer computes with, float32 ``[N, K]``."""
        weight = self.coded.dequantized()
        return weight if self.input_factor is None else weight * self.input_factor


class WeightMethod(ABC):
    """A way to choose codes for weights.

    A subclass is a frozen dataclass whose fields are its options, and is registered with
    ``@register_weight_method("name")``.

    Attributes:
        needs_data: whether ``inputs`` is needed; the layers of a model are then quantized in the
            order in which they run, each on the inputs that the quantized ones before it give.
    """

    name: ClassVar[str] = ""
    needs_data: ClassVar[bool] = False

    def for_convolution(self) -> WeightMethod:
        """The method for layers that have no factors of their inputs."""
        return self

    def for_output(self) -> WeightMethod:
        """The method for layers whose output is what the model returns, such as logits."""
        return self

    @abstractmethod
    def quantize(
        self, weights: Sequence[Tensor], grid: Grid, inputs: Inputs | None
    ) -> list[Result]:
        """Quantizes layers that read the same input.

        Args:
            weights: float32 ``[N, K]`` each.
            grid: how they are coded.
            inputs: what they read; None where it is not known.
        """


_METHODS: dict[str, type[WeightMethod]] = {}
_T = TypeVar("_T", bound=type[WeightMethod])


def register_weight_method(name: str) -> Callable[[_T], _T]:
    """Class decorator that adds a method under the name that ``quantize_weights`` takes.

    Raises:
        ValueError: the name belongs to another class already.
    """

    def register(cls: _T) -> _T:
        known = _METHODS.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"method {name!r} is registered already, for {known.__qualname__}")
        cls.name = name
        _METHODS[name] = cls
        return cls

    return register


def weight_methods() -> tuple[str, ...]:
    """The names of all methods."""
    return tuple(sorted(_METHODS))


def make_weight_method(name: str, options: Mapping[str, Any] | None = None) -> WeightMethod:
    """The method of a name with its options.

    Raises:
        ValueError: an unknown name or option; lists those that there are.
        TypeError: an option is of a wrong type.
    """
    if not isinstance(name, str) or name not in _METHODS:
        raise ValueError(f"unknown method {name!r}: use one of {', '.join(weight_methods())}")
    cls = _METHODS[name]
    known = list(inspect.signature(cls).parameters)
    unknown = [key for key in options or {} if key not in known]
    if unknown:
        raise ValueError(f"method {name!r} has no option {unknown}: its options are {known}")
    try:
        return cls(**dict(options or {}))
    except TypeError as error:
        raise TypeError(f"method {name!r}: an option is of a wrong type: {error}") from error


def output_error(weight: Tensor, quantized: Tensor, inputs: Inputs) -> float:
    """The mean over the data of the squared error that a layer's outputs have together."""
    difference = quantized - weight
    return float(((difference @ inputs.hessian) * difference).sum(dtype=torch.float64))

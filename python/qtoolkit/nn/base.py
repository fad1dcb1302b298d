"""What every quantized layer shares: its parameters of quantization, and where it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class QParams:
    """The quantization of one activation: ``real = scale * (code - zero_point)``.

    Attributes:
        scale: float32 tensor with one element.
        zero_point: int32 tensor with one element.
        quant_min: lowest code; negative for int8 codes.
        quant_max: highest code.
    """

    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int

    def same_as(self, other: QParams) -> bool:
        """True if both map every code to the same real number."""
        return (
            torch.equal(self.scale, other.scale)
            and torch.equal(self.zero_point, other.zero_point)
            and (self.quant_min, self.quant_max) == (other.quant_min, other.quant_max)
        )

    @property
    def format(self) -> str:
        """The name of the 8-bit storage: ``"int8"`` or ``"uint8"``."""
        return "int8" if self.quant_min < 0 else "uint8"


#: What ``qt.save`` keeps of each class of quantized modules, by the name of the class.
SAVED: dict[str, tuple[type[QuantizedModule], dict[str, Any]]] = {}

_Class = TypeVar("_Class", bound="type[QuantizedModule]")


def saved(**attributes: Any) -> Callable[[_Class], _Class]:
    """Says what makes a quantized module beside what all have, so that ``qt.save`` can keep it.

    Args:
        attributes: by name, the type of an attribute (``bool``, ``int``, ``float``, ``str``, a
            ``list`` or ``tuple`` of these, a union with None, a ``Literal``, or ``Any`` for more of
            these in tuples and dicts), the dtype of a buffer (``Tensor`` for any), or ``QParams``
            for what ``_register_qparams`` or ``_register_output`` makes. Every buffer may be
            None.
    """

    def register(cls: _Class) -> _Class:
        if cls.__name__ in SAVED:
            raise ValueError(f"a quantized module named {cls.__name__} is registered already")
        SAVED[cls.__name__] = (cls, attributes)
        return cls

    return register


class PlanStep:
    """A layer as a step of a plan: what the engine needs to know of it.

    Attributes:
        kind: name of the engine's step, a file in ``csrc/engine/steps``.
        integers: its integer attributes.
        constants: its tensors.
    """

    def __init__(self, kind: str, **integers: int | list[int]) -> None:
        self.kind = kind
        self.integers = {
            name: value if isinstance(value, list) else [int(value)]
            for name, value in integers.items()
        }
        self.constants: dict[str, Tensor] = {}
        #: Prefixes of the attributes of each input, in order.
        self.input_names: list[str] = []

    def constant(self, name: str, tensor: Tensor | None) -> None:
        """Adds a tensor; None is left out."""
        if tensor is not None:
            self.constants[name] = tensor.detach()

    def qparams(
        self, name: str, scale: Tensor | None, zero_point: Tensor, quant_min: int, quant_max: int
    ) -> None:
        """Adds the quantization of a value; without a scale it is left out."""
        if scale is not None:
            self.constants[f"{name}_scale"] = scale.detach().reshape(())
            self.integers[f"{name}_zero_point"] = [int(zero_point)]
            self.integers[f"{name}_range"] = [quant_min, quant_max]

    def input(
        self, name: str, scale: Tensor | None, zero_point: Tensor, dtype: torch.dtype
    ) -> None:
        """Adds the quantization of an input of codes of that dtype."""
        if scale is not None:
            self.input_names.append(name)
        limits = torch.iinfo(torch.int8 if dtype == torch.int8 else torch.uint8)
        self.qparams(name, scale, zero_point, limits.min, limits.max)

    def output(self, module: QuantizedModule) -> None:
        """Adds the quantization of a module's output; of a float32 output there is none."""
        self.qparams(
            "output",
            module.output_scale,
            module.output_zero_point,
            module.quant_min,
            module.quant_max,
        )


class QuantizedModule(nn.Module):
    """A layer that computes on 8-bit codes.

    Its weights, scales and zero points are plain tensors in buffers, so ``state_dict``,
    ``deepcopy``, ``pickle`` and ``torch.jit.script`` work as for any module.
    """

    # Class attributes without annotations: torch.jit.script cannot read annotations that are
    # strings.

    #: Name of the C++ kernel that computes it, for reports; empty if there is none.
    kernel = ""
    #: Dotted name of the float layer it stands for; set by ``qt.convert``.
    source = ""
    #: Name of the node in the captured float graph that has the same output, for ``qt.compare``.
    float_node = ""
    #: Whether ReLU follows its function, before the output is quantized.
    relu = False
    #: Buffers that pickles, checkpoints and files of older versions lack; they are None then.
    newer_buffers = cast("tuple[str, ...]", ())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves to another device; scales keep their dtype under ``.half()`` and the like."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in self.newer_buffers:
            self._buffers.setdefault(name, None)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # With the ranges of a checkpoint that lacks them, one's own would be of other ranges.
        for name in self.newer_buffers if prefix + "input_scale" in state_dict else ():
            known = state_dict.get(prefix + name)
            device = self.input_scale.device
            value = None if known is None else torch.empty_like(known, device=device)
            self.register_buffer(name, value)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._clip_output()

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def _register_qparams(self, prefix: str, qparams: QParams | None) -> None:
        """Adds buffers ``<prefix>_scale`` and ``<prefix>_zero_point`` (None: both absent)."""
        scale = None if qparams is None else qparams.scale.detach().float().reshape(()).clone()
        zero_point = (
            None if qparams is None else qparams.zero_point.detach().int().reshape(()).clone()
        )
        self.register_buffer(f"{prefix}_scale", scale)
        self.register_buffer(f"{prefix}_zero_point", zero_point)

    def _register_output(self, qparams: QParams | None, upper: float | None = None) -> None:
        """Adds the output's buffers and code range; ``upper`` clips the real output at that
        value."""
        self._register_qparams("output", qparams)
        self.quant_min = 0 if qparams is None else qparams.quant_min
        self.format_max = self.quant_max = 255 if qparams is None else qparams.quant_max
        self.upper = upper
        self._clip_output()

    def _clip_output(self) -> None:
        """Lowers the highest code to that of the upper bound, which depends on the scale."""
        upper = getattr(self, "upper", None)
        if upper is None or self.output_scale is None:
            return
        zero_point = int(self.output_zero_point)
        code = round(upper / float(self.output_scale)) + zero_point
        self.quant_max = max(min(self.format_max, code), zero_point)

    def plan_step_of_call(self, dtypes: list[torch.dtype], numbers: list[Any]) -> PlanStep | None:
        """The same where the call also gives numbers; None if they are not known to the step."""
        return None if numbers else self.plan_step(dtypes)

    def plan_step(self, dtypes: list[torch.dtype]) -> PlanStep | None:
        """This layer as a step of a plan, for inputs of those dtypes; None if there is none."""
        return None

    def prepare_float(self) -> None:
        """Adds the buffers that ``float_forward`` needs, to a copy that is to be exported."""

    def float_forward(self, *inputs: Any) -> Tensor:
        """Its function of real numbers, for export: ``forward`` without the codes.

        Takes what ``forward`` takes, dequantized, and not the residual; gives float32. ReLU, an
        upper bound and the addition of a residual are left to the caller.

        Raises:
            NotImplementedError: it has none.
        """
        raise NotImplementedError(f"{type(self).__name__} has no float form")

    def kind(self) -> str:
        """What it is, for reports."""
        return type(self).__name__

    def formats(self) -> str:
        """What it reads and writes, for reports, such as ``"uint8 x int8 -> uint8"``."""
        return ""


def code_format(quant_min: int) -> str:
    """The storage of codes whose lowest is ``quant_min``."""
    return "int8" if quant_min < 0 else "uint8"

"""Describes what is quantized and how: TensorSpec, QConfig, QConfigMapping and the presets.

All are frozen dataclasses that go to JSON and back without loss.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import torch

from qtoolkit.formats import get_format

GRANULARITIES = ("per_tensor", "per_channel", "per_group")

Self = TypeVar("Self", bound="_JsonFields")


class _JsonFields:
    """JSON text on top of a class's to_dict and from_dict."""

    def to_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    @classmethod
    def from_dict(cls: type[Self], data: Mapping[str, Any]) -> Self:
        raise NotImplementedError

    def to_json(self) -> str:
        """This object as JSON text; `from_json` gives an equal object back."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls: type[Self], text: str | Mapping[str, Any]) -> Self:
        """The object that `to_json` wrote; a dict (parsed JSON) is taken as well.

        Raises ValueError for text that is not JSON and for unknown or missing keys.
        """
        if not isinstance(text, str):
            return cls.from_dict(text)
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{cls.__name__}.from_json: not valid JSON: {error}") from error
        return cls.from_dict(data)


def _check_keys(
    owner: str, data: Any, allowed: Iterable[str], required: Iterable[str] = ()
) -> None:
    if not isinstance(data, Mapping):
        raise ValueError(f"{owner}: expected a JSON object, got {type(data).__name__}")
    allowed = tuple(allowed)
    unknown = [key for key in data if key not in allowed]
    missing = [key for key in required if key not in data]
    if unknown:
        raise ValueError(f"{owner}: unknown keys {unknown}; the keys are {list(allowed)}")
    if missing:
        raise ValueError(f"{owner}: missing keys {missing}")


@dataclass(frozen=True)
class TensorSpec(_JsonFields):
    """How one tensor is quantized.

    Args:
        format: name of a number format, e.g. "uint8" or "int8" (see `qtoolkit.formats.FORMATS`).
        granularity: "per_tensor" (one scale), "per_channel" (one for each index of `axis`) or, for
            weights, "per_group" (one for each `group_size` neighbours along the input dimensions).
        axis: the channel dimension of a per-channel tensor, counted from 0.
        group_size: how many values share a scale with "per_group"; else None.
        symmetric: real 0 gets the middle code (0, or 128 for uint8), and the range mirrors around
            it: signed formats leave their lowest code out, int8 uses [-127, 127].
        observer: registered name of the observer that chooses the range: "minmax",
            "moving_average", "histogram", "percentile", "mse", "entropy" per tensor,
            "per_channel_minmax", "per_channel_mse", "per_group_minmax", or one added with
            `qtoolkit.observers.register_observer`. Methods that need none ignore it.
        method: registered name of the way to simulate it in training: "observed" (the observer's
            range, straight-through gradients; the only one for post-training quantization), "lsq",
            "lsq+", "pact", "twn", "xnor", "float", "block_float" or one added with
            `qtoolkit.fake_quantize.register_fake_quantize`.
        observer_options: what the observer is made with, by name, such as {"bins": 512} or
            {"averaging_constant": 0.1}; a dict is kept as a tuple of pairs. Defaults where absent.

    Raises:
        ValueError: a field has a value that is not allowed; the message lists those that are.
        TypeError: a field has a wrong type.
    """

    format: str = "uint8"
    granularity: str = "per_tensor"
    axis: int = 0
    group_size: int | None = None
    symmetric: bool = False
    observer: str = "histogram"
    method: str = "observed"
    observer_options: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        # Observers and methods take a TensorSpec, so they are looked up when one is made.
        from qtoolkit.fake_quantize.registry import get_fake_quantize_class
        from qtoolkit.observers.registry import get_observer_class

        get_format(self.format)
        if self.granularity not in GRANULARITIES:
            raise ValueError(
                f"TensorSpec: unknown granularity {self.granularity!r}; use one of {GRANULARITIES}"
            )
        if not isinstance(self.axis, int) or isinstance(self.axis, bool):
            raise TypeError(f"TensorSpec: axis must be an int, got {self.axis!r}")
        if self.axis < 0:
            raise ValueError(f"TensorSpec: axis counts from 0 and cannot be {self.axis}")
        if (self.granularity == "per_group") != (self.group_size is not None):
            raise ValueError(
                "TensorSpec: granularity per_group, and no other, needs a group_size; got "
                f"{self.granularity} and {self.group_size!r}"
            )
        if self.group_size is not None:
            if not isinstance(self.group_size, int) or isinstance(self.group_size, bool):
                raise TypeError(f"TensorSpec: group_size must be an int, got {self.group_size!r}")
            if self.group_size < 1:
                raise ValueError(f"TensorSpec: group_size must be positive, got {self.group_size}")
        if not isinstance(self.symmetric, bool):
            raise TypeError(f"TensorSpec: symmetric must be a bool, got {self.symmetric!r}")
        observer_class = get_observer_class(self.observer)
        self._settle_options(observer_class.options)
        method = get_fake_quantize_class(self.method)
        problem = method.problem(self)
        if problem is not None:
            raise ValueError(f"TensorSpec: method {self.method!r} {problem}")
        observed = method.uses_observer(self)
        if observed and self.granularity not in observer_class.granularities:
            raise ValueError(
                f"TensorSpec: observer {self.observer!r} is for granularity "
                f"{' or '.join(observer_class.granularities)}, not {self.granularity}"
            )

    def _settle_options(self, allowed: tuple[str, ...]) -> None:
        """Keeps the observer's options as sorted pairs, equal for equal options."""
        try:
            options = dict(self.observer_options)
        except (TypeError, ValueError):
            raise TypeError(
                "TensorSpec: observer_options must be a dict of names and numbers, got "
                f"{self.observer_options!r}"
            ) from None
        for name, value in options.items():
            if name not in allowed:
                raise ValueError(
                    f"TensorSpec: observer {self.observer!r} has no option {name!r}; it has "
                    f"{', '.join(allowed) or 'none'}"
                )
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise TypeError(f"TensorSpec: option {name!r} must be a number, got {value!r}")
        object.__setattr__(self, "observer_options", tuple(sorted(options.items())))

    @property
    def quant_min(self) -> int:
        """The lowest code."""
        return get_format(self.format).quant_range(self.symmetric)[0]

    @property
    def quant_max(self) -> int:
        """The highest code."""
        return get_format(self.format).quant_range(self.symmetric)[1]

    def problem_as(self, role: str) -> str | None:
        """Why the method is not for an "activation" or a "weight", or None if it is."""
        from qtoolkit.fake_quantize.registry import get_fake_quantize_class

        return get_fake_quantize_class(self.method).problem_as(self, role)

    def to_dict(self) -> dict[str, Any]:
        """The fields by name; ``observer_options`` as a dict, and only where there are some."""
        data = asdict(self)
        options = dict(data.pop("observer_options"))
        return {**data, "observer_options": options} if options else data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TensorSpec:
        """The reverse of `to_dict`; fields that are absent have their defaults."""
        _check_keys("TensorSpec", data, (field.name for field in fields(cls)))
        return cls(**data)


@dataclass(frozen=True)
class QConfig(_JsonFields):
    """How a layer is quantized: its activations (inputs and outputs) and its weight.

    None leaves that tensor in float.
    """

    activation: TensorSpec | None
    weight: TensorSpec | None

    def __post_init__(self) -> None:
        for name in ("activation", "weight"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, TensorSpec):
                raise TypeError(
                    f"QConfig: {name} must be a TensorSpec or None, got {type(value).__name__}"
                )
            problem = None if value is None else value.problem_as(name)
            if problem is not None:
                raise ValueError(f"QConfig: {name}: {problem}, got {value}")

    def to_dict(self) -> dict[str, Any]:
        """The two specs as dicts."""
        return {
            "activation": None if self.activation is None else self.activation.to_dict(),
            "weight": None if self.weight is None else self.weight.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QConfig:
        """The reverse of `to_dict`."""
        keys = ("activation", "weight")
        _check_keys("QConfig", data, keys, required=keys)
        specs = (None if data[key] is None else TensorSpec.from_dict(data[key]) for key in keys)
        return cls(*specs)


OpType = type | str | Callable[..., Any]
Entry = tuple[str, QConfig | None]


def canonical_type_name(op_type: OpType) -> str:
    """torch.nn's modules by their public name, other types qualified, functions by their name."""
    if isinstance(op_type, str):
        name = op_type
    elif isinstance(op_type, type):
        name = f"{op_type.__module__}.{op_type.__qualname__}"
    elif callable(op_type) and hasattr(op_type, "__name__"):
        name = op_type.__name__
    else:
        raise TypeError(f"expected a module type, a function or the name of one, got {op_type!r}")
    public = re.fullmatch(r"torch\.nn\.modules\.\w+\.(\w+)", name)
    return f"torch.nn.{public[1]}" if public and hasattr(torch.nn, public[1]) else name


def same_type(a: str, b: str) -> bool:
    """Equal, or one is a short form of the other: "Conv2d" and "torch.nn.Conv2d"."""
    return a == b or a.endswith(f".{b}") or b.endswith(f".{a}")


def matches_name(pattern: str, name: str) -> bool:
    """The pattern matches the name or that of a module which holds it."""
    parts = name.split(".")
    return any(
        fnmatch.fnmatchcase(".".join(parts[:length]), pattern)
        for length in range(1, len(parts) + 1)
    )


@dataclass(frozen=True)
class QConfigMapping(_JsonFields):
    """Which QConfig each layer of a model gets; None keeps a layer in float.

    Made by the `set_` methods, which return a new mapping each:

        QConfigMapping().set_global(q).set_module_type(nn.Linear, None).set_module_name("fc*", q2)

    A setting by name goes before one by type, and that before the global one. Among settings of
    one kind that apply, the one set last counts.
    """

    global_qconfig: QConfig | None = None
    module_types: tuple[Entry, ...] = ()
    module_names: tuple[Entry, ...] = ()

    def set_global(self, qconfig: QConfig | None) -> QConfigMapping:
        """Sets what applies to every layer that no other setting names."""
        _check_qconfig("set_global", qconfig)
        return self._with(global_qconfig=qconfig)

    def set_module_type(self, op_type: OpType, qconfig: QConfig | None) -> QConfigMapping:
        """Sets the QConfig of a kind of operation.

        Args:
            op_type: a module class, its qualified or short name ("torch.nn.Conv2d", "Conv2d"), or
                a function or its name ("add"). "input" stands for the model's inputs, which are
                quantized as their first reader's results otherwise.
            qconfig: what its layers get; None keeps them in float.
        """
        _check_qconfig("set_module_type", qconfig)
        entry = (canonical_type_name(op_type), qconfig)
        return self._with(module_types=_with_last(self.module_types, entry))

    def set_module_name(self, pattern: str, qconfig: QConfig | None) -> QConfigMapping:
        """Sets the QConfig of the modules whose dotted name matches, and of what they hold.

        Args:
            pattern: a shell pattern (`fnmatch`, case-sensitive): "fc", "layer1.*", "*.conv1".
                "layer1" applies to "layer1.0.conv1" too, and to functions that its `forward` calls.
            qconfig: what these layers get; None keeps them in float.
        """
        if not isinstance(pattern, str) or not pattern:
            raise TypeError(f"set_module_name: the pattern must be a name, got {pattern!r}")
        _check_qconfig("set_module_name", qconfig)
        return self._with(module_names=_with_last(self.module_names, (pattern, qconfig)))

    def _with(self, **changes: Any) -> QConfigMapping:
        """A mapping of this class itself, as a subclass's further fields would not hold for it."""
        own = {field.name: getattr(self, field.name) for field in fields(QConfigMapping)}
        return QConfigMapping(**{**own, **changes})

    def qconfig_for(self, name: str, op_type: OpType, *, inside: str = "") -> QConfig | None:
        """The QConfig of one layer.

        Args:
            name: dotted name of the module, or name of a function's call.
            op_type: its class, or the name of the class or of the function.
            inside: dotted name of the module whose ``forward`` makes the call, for a function.
        """
        for pattern, qconfig in reversed(self.module_names):
            if matches_name(pattern, name) or (inside and matches_name(pattern, inside)):
                return qconfig
        type_name = canonical_type_name(op_type)
        for known, qconfig in reversed(self.module_types):
            if same_type(known, type_name):
                return qconfig
        return self.global_qconfig

    def input_spec(self) -> TensorSpec | None:
        """How the model's inputs are quantized; None: as their first reader's results."""
        qconfig = dict(self.module_types).get("input")
        return None if qconfig is None else qconfig.activation

    def to_dict(self) -> dict[str, Any]:
        """The settings in the order in which they were made."""

        def entries(items: tuple[Entry, ...]) -> list[list[Any]]:
            return [[key, None if q is None else q.to_dict()] for key, q in items]

        return {
            "global": None if self.global_qconfig is None else self.global_qconfig.to_dict(),
            "module_type": entries(self.module_types),
            "module_name": entries(self.module_names),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QConfigMapping:
        """The reverse of `to_dict`."""
        _check_keys("QConfigMapping", data, ("global", "module_type", "module_name"))

        def qconfig(value: Any) -> QConfig | None:
            return None if value is None else QConfig.from_dict(value)

        mapping = cls().set_global(qconfig(data.get("global")))
        for key in ("module_type", "module_name"):
            entries = data.get(key, [])
            if not isinstance(entries, list) or any(
                not isinstance(entry, list) or len(entry) != 2 for entry in entries
            ):
                raise ValueError(f"QConfigMapping: {key} must be a list of [name, QConfig] pairs")
            for name, value in entries:
                mapping = getattr(mapping, f"set_{key}")(name, qconfig(value))
        return mapping


def _check_qconfig(where: str, qconfig: Any) -> None:
    if qconfig is not None and not isinstance(qconfig, QConfig):
        raise TypeError(f"{where}: expected a QConfig or None, got {type(qconfig).__name__}")


def _with_last(entries: tuple[Entry, ...], entry: Entry) -> tuple[Entry, ...]:
    """The entries with `entry` as the last one, without an earlier one of the same key."""
    return (*(known for known in entries if known[0] != entry[0]), entry)


def _weight_per_channel() -> TensorSpec:
    return TensorSpec("int8", "per_channel", symmetric=True, observer="per_channel_minmax")


def _weight_per_tensor() -> TensorSpec:
    return TensorSpec("int8", symmetric=True, observer="minmax")


# target: format of activations, whether they are symmetric, maker of the weight's spec
_PRESETS: dict[str, tuple[str, bool, Callable[[], TensorSpec]]] = {
    "x86": ("uint8", False, _weight_per_channel),
    "fbgemm": ("uint8", False, _weight_per_channel),
    "qnnpack": ("uint8", False, _weight_per_tensor),
    "tensorrt": ("int8", True, _weight_per_channel),
    "openvino": ("uint8", False, _weight_per_channel),
    "tflite": ("int8", False, _weight_per_channel),
}


def _preset(target: str, activation_observer: str) -> QConfigMapping:
    if target not in _PRESETS:
        raise ValueError(f"unknown target {target!r}: use one of {', '.join(_PRESETS)}")
    activation_format, symmetric, weight = _PRESETS[target]
    activation = TensorSpec(activation_format, symmetric=symmetric, observer=activation_observer)
    return QConfigMapping().set_global(QConfig(activation, weight()))


def get_default_qconfig_mapping(target: str = "x86") -> QConfigMapping:
    """The mapping for post-training quantization that suits a runtime.

    Args:
        target: "x86", "fbgemm", "openvino" (uint8 affine activations, int8 weights per channel),
            "qnnpack" (the same with weights per tensor), "tensorrt" (int8 symmetric activations) or
            "tflite" (int8 affine activations).

    Raises:
        ValueError: another target.
    """
    return _preset(target, "histogram")


def get_default_qat_qconfig_mapping(target: str = "x86") -> QConfigMapping:
    """`get_default_qconfig_mapping` for training: activation ranges are moving averages."""
    return _preset(target, "moving_average")

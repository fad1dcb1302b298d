"""Modules of PyTorch that are made of layers, which may have been replaced by quantized ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn import functional

from qtoolkit.nn import recurrent
from qtoolkit.saving.container import require

_ACTIVATIONS = {"relu": functional.relu, "gelu": functional.gelu}


@dataclass(frozen=True)
class Composite:
    """A class of modules.

    Attributes:
        kind: the class.
        options: types of its attributes.
        layers: names of the layers that it always has.
        optional: one that it may have, empty if there is none.
    """

    kind: type[nn.Module]
    options: Mapping[str, type]
    layers: frozenset[str]
    optional: str


#: By the name that a file gives them.
COMPOSITES = {
    "torch.nn.TransformerEncoder": Composite(
        nn.TransformerEncoder,
        {
            "num_layers": int,
            "enable_nested_tensor": bool,
            "use_nested_tensor": bool,
            "mask_check": bool,
        },
        frozenset({"layers"}),
        "norm",
    ),
    "torch.nn.TransformerEncoderLayer": Composite(
        nn.TransformerEncoderLayer,
        {"norm_first": bool, "activation_relu_or_gelu": int},
        frozenset(
            ["self_attn", "linear1", "dropout", "linear2", "norm1", "norm2", "dropout1", "dropout2"]
        ),
        "activation",
    ),
    "qtoolkit.nn.RecurrentLayer": Composite(
        recurrent.RecurrentLayer, {"mode": str}, frozenset({"input", "hidden"}), "projection"
    ),
    **{
        f"qtoolkit.nn.{kind.__name__}": Composite(
            kind,
            {
                "mode": str,
                "input_size": int,
                "hidden_size": int,
                "num_layers": int,
                "bias": bool,
                "batch_first": bool,
                "dropout": float,
                "bidirectional": bool,
                "proj_size": int,
            },
            frozenset({"layers"}),
            "",
        )
        for kind in (recurrent.DynamicLSTM, recurrent.DynamicGRU, recurrent.DynamicRNN)
    },
    **{
        f"qtoolkit.nn.{kind.__name__}": Composite(
            kind,
            {"mode": str, "input_size": int, "hidden_size": int, "bias": bool},
            frozenset({"input", "hidden"}),
            "",
        )
        for kind in (recurrent.DynamicLSTMCell, recurrent.DynamicGRUCell, recurrent.DynamicRNNCell)
    },
}
COMPOSITE_NAMES = {composite.kind: name for name, composite in COMPOSITES.items()}


def composite_options(module: nn.Module) -> dict[str, Any]:
    """The attributes of a composite as JSON.

    Raises:
        TypeError: one has no place in a file.
    """
    composite = COMPOSITES[COMPOSITE_NAMES[type(module)]]
    options = {name: getattr(module, name) for name in composite.options}
    for name, kind in composite.options.items():
        if type(options[name]) is not kind:
            raise TypeError(f"a {type(module).__name__} whose {name} is {options[name]!r}")
    function = vars(module).get("activation")
    if function is not None:
        names = [name for name, known in _ACTIVATIONS.items() if known is function]
        if not names:
            raise TypeError("a transformer with an activation of its own")
        options["activation"] = names[0]
    return options


def make_composite(name: str, options: Any, layers: dict[str, nn.Module | None]) -> nn.Module:
    """A composite from its parts.

    Raises:
        InvalidFileError: the parts are not those of the class.
    """
    composite = COMPOSITES[name]
    require(isinstance(options, dict), "its options must be an object")
    names = {key for key, layer in layers.items() if layer is not None}
    good = composite.layers <= names <= composite.layers | {composite.optional}
    require(good, f"its layers must be {sorted(composite.layers)} and may be {composite.optional}")
    module = composite.kind.__new__(composite.kind)
    nn.Module.__init__(module)
    for key, kind in composite.options.items():
        require(type(options.get(key)) is kind, f"its {key} must be {kind.__name__}")
        setattr(module, key, options[key])
    known = set(composite.options)
    if composite.optional and composite.optional not in names:
        value = None
        if composite.optional == "activation":
            known.add("activation")
            value = _ACTIVATIONS.get(str(options.get("activation")))
            require(value is not None, f"its activation must be one of {sorted(_ACTIVATIONS)}")
        setattr(module, composite.optional, value)
    require(options.keys() == known, f"its options must be {sorted(known)}")
    for key, layer in layers.items():
        module.add_module(key, layer)
    return module

"""Recipes: what a model is quantized with, by name or from a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from qtoolkit.algorithms import AFTER, BEFORE, Algorithm, make_algorithm
from qtoolkit.presets import keep_edges
from qtoolkit.qconfig import QConfig, QConfigMapping, TensorSpec, get_default_qconfig_mapping

#: Version of the recipes that this package writes; it reads that and earlier ones.
VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """Formats and algorithms for post-training quantization.

    Attributes:
        name: for reports.
        mapping: how each layer is quantized.
        passes: algorithms in the order in which they run; those before calibration come first.
        edges: how the first and the last layer with a weight are quantized, and average pooling
            between layers of fewer bits; None: as ``mapping`` says.
        weight_only: a format of ``quantize_weights``, with activations in float16; the mapping
            must then be empty. None: as ``mapping`` says.

    Raises:
        TypeError: a field has a wrong type.
        ValueError: a pass that runs before calibration follows one that runs after it.
    """

    name: str
    mapping: QConfigMapping
    passes: tuple[Algorithm, ...] = ()
    edges: QConfig | None = None
    weight_only: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.mapping, QConfigMapping):
            raise TypeError(
                f"recipe {self.name!r}: mapping must be a QConfigMapping, got "
                f"{type(self.mapping).__name__}"
            )
        if self.edges is not None and not isinstance(self.edges, QConfig):
            raise TypeError(
                f"recipe {self.name!r}: edges must be a QConfig, got {type(self.edges).__name__}"
            )
        if self.weight_only and (self.mapping != QConfigMapping() or self.passes or self.edges):
            raise ValueError(
                f"recipe {self.name!r}: with weight_only there can be no mapping, passes or edges"
            )
        for algorithm in self.passes:
            if not isinstance(algorithm, Algorithm):
                raise TypeError(
                    f"recipe {self.name!r}: passes are algorithms, got {type(algorithm).__name__}"
                )
        stages = [algorithm.stage for algorithm in self.passes]
        if (AFTER, BEFORE) in pairwise(stages):
            raise ValueError(
                f"recipe {self.name!r}: a pass that runs before calibration follows one that runs "
                f"after it: {[algorithm.name for algorithm in self.passes]}"
            )

    def mapping_for(self, model: nn.Module) -> QConfigMapping:
        """How each layer of a float model is quantized."""
        return self.mapping if self.edges is None else keep_edges(model, self.mapping, self.edges)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, with the version."""
        passes = [
            {"name": algorithm.name, **asdict(algorithm)}  # type: ignore[call-overload]
            for algorithm in self.passes
        ]
        return {
            "version": VERSION,
            "name": self.name,
            "mapping": self.mapping.to_dict(),
            "passes": passes,
            "edges": None if self.edges is None else self.edges.to_dict(),
            "weight_only": self.weight_only,
        }

    @classmethod
    def from_dict(cls, data: Any) -> Recipe:
        """The reverse of ``to_dict``. Instead of ``mapping`` there may be ``target``, a name that
        ``get_default_qconfig_mapping`` takes.

        Raises:
            ValueError: a key, version, pass or option that is unknown, or one that is missing.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"a recipe must be an object with keys, got {type(data).__name__}")
        allowed = {"version", "name", "mapping", "target", "passes", "edges", "weight_only"}
        unknown = sorted(set(data) - allowed)
        if unknown:
            raise ValueError(f"recipe: unknown keys {unknown}; the keys are {sorted(allowed)}")
        version = data.get("version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise ValueError(
                f"recipe: version must be {VERSION} or an earlier one, got {version!r}"
            )
        if version > VERSION:
            raise ValueError(
                f"recipe: version {version} is newer than {VERSION}, the newest that this qtoolkit "
                "reads; install a newer one"
            )
        weight_only = data.get("weight_only")
        if weight_only is not None and not isinstance(weight_only, str):
            raise ValueError(f"recipe: weight_only must be a format's name, got {weight_only!r}")
        if ("mapping" in data and "target" in data) or not {"mapping", "target"} & set(data):
            raise ValueError("recipe: give either mapping or target")
        passes = data.get("passes", [])
        if not isinstance(passes, list):
            raise ValueError(f"recipe: passes must be a list, got {type(passes).__name__}")
        mapping = (
            QConfigMapping.from_dict(data["mapping"])
            if "mapping" in data
            else get_default_qconfig_mapping(data["target"])
        )
        edges = data.get("edges")
        return cls(
            str(data.get("name", "recipe")),
            mapping,
            tuple(map(_pass_of, passes)),
            None if edges is None else QConfig.from_dict(edges),
            weight_only,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the recipe as JSON, or as YAML where the name ends so."""
        text = (
            _yaml().safe_dump(self.to_dict(), sort_keys=False)
            if _is_yaml(path)
            else json.dumps(self.to_dict(), indent=2) + "\n"
        )
        Path(path).write_text(text)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Reads a recipe in JSON or YAML (``.yaml``, ``.yml``).

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no recipe; the message names the file.
            ImportError: YAML without the package ``pyyaml``.
        """
        text = Path(path).read_text()
        try:
            data = _yaml().safe_load(text) if _is_yaml(path) else json.loads(text)
            return cls.from_dict(data)
        except ImportError:
            raise
        except Exception as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error


def _pass_of(entry: Any) -> Algorithm:
    if isinstance(entry, str):
        return make_algorithm(entry)
    if not isinstance(entry, Mapping) or "name" not in entry:
        raise ValueError(f"recipe: a pass is a name or an object with one, got {entry!r}")
    return make_algorithm(entry["name"], {k: v for k, v in entry.items() if k != "name"})


def _is_yaml(path: str | os.PathLike[str]) -> bool:
    return Path(path).suffix in (".yaml", ".yml")


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("recipes in YAML need pyyaml: pip install 'qtoolkit[yaml]'") from error
    return yaml


def _careful(mapping: QConfigMapping) -> QConfigMapping:
    """The mapping with layer norms in float, and so the sums that only they read: tokens of small
    values beside large ones have few codes, and a layer norm makes all tokens equally large."""
    return mapping.set_module_type(nn.LayerNorm, None)


def _target(target: str, *passes: str) -> Callable[[], Recipe]:
    """The default mapping of a runtime with some algorithms."""
    return lambda: Recipe(
        target, _careful(get_default_qconfig_mapping(target)), tuple(map(make_algorithm, passes))
    )


def _few_bits(name: str, activation: str, *passes: str) -> Recipe:
    """4-bit weights, with the first and the last layer at 8 bits."""
    eight = get_default_qconfig_mapping("x86").global_qconfig
    assert eight is not None
    weight = TensorSpec("int4", "per_channel", symmetric=True, observer="per_channel_minmax")
    mapping = _careful(QConfigMapping().set_global(QConfig(TensorSpec(activation), weight)))
    return Recipe(name, mapping, tuple(map(make_algorithm, passes)), eight)


_RECIPES: dict[str, Callable[[], Recipe]] = {
    "w8a8": lambda: replace(_target("x86", "range_selection", "bias_correction")(), name="w8a8"),
    "w8a8-fast": lambda: Recipe("w8a8-fast", get_default_qconfig_mapping("x86")),
    "w4a8": lambda: _few_bits("w4a8", "uint8", "adaround", "bias_correction"),
    "w4a4": lambda: _few_bits("w4a4", "uint4", "block_reconstruction"),
    "w8a16": lambda: Recipe("w8a16", QConfigMapping(), weight_only="int8"),
    "fp16": lambda: Recipe("fp16", QConfigMapping(), weight_only="fp16"),
    "tensorrt": _target("tensorrt", "bias_correction"),
    "openvino": _target("openvino", "bias_correction"),
    "tflite": _target("tflite", "bias_correction"),
    # One scale for all channels of a weight.
    "qnnpack": _target("qnnpack", "cross_layer_equalization", "bias_correction"),
}


def recipe_names() -> tuple[str, ...]:
    """The names that ``get_recipe`` knows."""
    return tuple(_RECIPES)


def get_recipe(recipe: str | Recipe | QConfigMapping | os.PathLike[str]) -> Recipe:
    """A recipe by name, or from a file.

    Args:
        recipe: one of ``recipe_names()``; a path of a JSON or YAML file; a mapping, which gets the
            passes of "w8a8"; or a recipe, which is returned.

    Raises:
        ValueError: no such name or file, or the file is no recipe.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, QConfigMapping):
        return Recipe("mapping", recipe, get_recipe("w8a8").passes)
    name = os.fspath(recipe)
    if name in _RECIPES:
        return _RECIPES[name]()
    if Path(name).is_file():
        return Recipe.load(name)
    raise ValueError(
        f"unknown recipe {name!r}: use one of {', '.join(_RECIPES)}, or the path of a file"
    )

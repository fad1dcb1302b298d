"""qtoolkit: quantization for PyTorch, from a float model to a verified low-precision one.

import qtoolkit as qt

prepared = qt.prepare(model, qt.get_default_qconfig_mapping("x86"), example_inputs=(x,))
qt.calibrate(prepared, loader, max_batches=32)
quantized = qt.convert(prepared)
qt.export.torchscript(quantized, "model.pt", example_inputs=(x,))
"""

from qtoolkit import _library  # isort: skip  (loads the operators, which the rest needs)
from qtoolkit import algorithms, export, nn, observers, ops, registry, weight_only
from qtoolkit._library import cmake_prefix_path
from qtoolkit._version import __version__
from qtoolkit.autoquantize import AutoQuantization, QuantizationStep, autoquantize
from qtoolkit.compare import Comparison, LayerComparison, compare
from qtoolkit.compile import compile
from qtoolkit.distributed import synchronize
from qtoolkit.dynamic import quantize_dynamic
from qtoolkit.explain import explain
from qtoolkit.fake_quantize import FakeQuantize
from qtoolkit.metrics import evaluate, model_size
from qtoolkit.mixed_precision import LayerChoice, MixedPrecision, mixed_precision
from qtoolkit.plan_file import load_plan, save_plan
from qtoolkit.presets import low_bit_qconfig_mapping
from qtoolkit.qconfig import (
    QConfig,
    QConfigMapping,
    TensorSpec,
    get_default_qat_qconfig_mapping,
    get_default_qconfig_mapping,
)
from qtoolkit.quantize import quantize
from qtoolkit.recipe import Recipe, get_recipe, recipe_names
from qtoolkit.saving import InvalidFileError, file_info, load, save
from qtoolkit.sensitivity import LayerSensitivity, Sensitivity, sensitivity
from qtoolkit.training import (
    QATSchedule,
    disable_fake_quant,
    distillation_loss,
    enable_fake_quant,
    freeze_bn,
    freeze_observers,
)
from qtoolkit.weight_only import quantize_weights
from qtoolkit.workflow import calibrate, convert, prepare, prepare_qat

__all__ = [
    "AutoQuantization",
    "Comparison",
    "FakeQuantize",
    "InvalidFileError",
    "LayerChoice",
    "LayerComparison",
    "LayerSensitivity",
    "MixedPrecision",
    "QATSchedule",
    "QConfig",
    "QConfigMapping",
    "QuantizationStep",
    "Recipe",
    "Sensitivity",
    "TensorSpec",
    "__version__",
    "_library",
    "algorithms",
    "autoquantize",
    "calibrate",
    "cmake_prefix_path",
    "compare",
    "compile",
    "convert",
    "disable_fake_quant",
    "distillation_loss",
    "enable_fake_quant",
    "evaluate",
    "explain",
    "export",
    "file_info",
    "freeze_bn",
    "freeze_observers",
    "get_default_qat_qconfig_mapping",
    "get_default_qconfig_mapping",
    "get_recipe",
    "load",
    "load_plan",
    "low_bit_qconfig_mapping",
    "mixed_precision",
    "model_size",
    "nn",
    "observers",
    "ops",
    "prepare",
    "prepare_qat",
    "quantize",
    "quantize_dynamic",
    "quantize_weights",
    "recipe_names",
    "registry",
    "save",
    "save_plan",
    "sensitivity",
    "synchronize",
    "weight_only",
]

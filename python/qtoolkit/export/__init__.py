"""Files for the runtimes that a quantized model is deployed to."""

from qtoolkit.export.errors import MissingPackageError, UnsupportedError, VerificationError
from qtoolkit.export.onnx import onnx
from qtoolkit.export.openvino import openvino
from qtoolkit.export.plan import plan
from qtoolkit.export.pt2 import pt2
from qtoolkit.export.registry import LoadedModel, TargetInfo, load, targets
from qtoolkit.export.report import ExportReport, LayersReport, OutputReport
from qtoolkit.export.tensorrt import tensorrt
from qtoolkit.export.tensorrt_rules import Rule, Violation, check_tensorrt
from qtoolkit.export.tflite import tflite
from qtoolkit.export.torchscript import torchscript

__all__ = [
    "ExportReport",
    "LayersReport",
    "LoadedModel",
    "MissingPackageError",
    "OutputReport",
    "Rule",
    "TargetInfo",
    "UnsupportedError",
    "VerificationError",
    "Violation",
    "check_tensorrt",
    "load",
    "onnx",
    "openvino",
    "plan",
    "pt2",
    "targets",
    "tensorrt",
    "tflite",
    "torchscript",
]

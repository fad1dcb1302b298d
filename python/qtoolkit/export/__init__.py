"""Files for the runtimes that a quantized model is deployed to."""

from qtoolkit.export.report import ExportReport
from qtoolkit.export.torchscript import torchscript

__all__ = ["ExportReport", "torchscript"]

"""Quantized models in files without code: safetensors and JSON."""

from qtoolkit.saving.container import InvalidFileError
from qtoolkit.saving.file import FileInfo, file_info, load, save
from qtoolkit.saving.summary import LayerInfo

__all__ = ["FileInfo", "InvalidFileError", "LayerInfo", "file_info", "load", "save"]

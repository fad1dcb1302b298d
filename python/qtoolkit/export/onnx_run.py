"""ONNX files in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: Where ONNX Runtime looks for weights that lie beside a graph that it is given in memory.
_FOLDER = "session.model_external_initializers_file_folder_path"


class OnnxRuntime:
    """A file in ONNX Runtime on the CPU.

    Attributes:
        version: name and version, and whether optimizations are off.
    """

    def __init__(self, path: Path, *, optimize: bool = True) -> None:
        import onnxruntime

        self.path = path
        self.optimize = optimize
        self.version = f"ONNX Runtime {onnxruntime.__version__} (CPU)" + (
            "" if optimize else ", optimizations off"
        )
        self._session = self._load(path.read_bytes())

    def _load(self, graph: bytes) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(_FOLDER, str(self.path.parent.resolve()))
        if not self.optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def run(
        self, inputs: list[Tensor], names: Sequence[str]
    ) -> tuple[list[Tensor], Mapping[str, Tensor]]:
        """See ``verify.Runner``; named values become outputs of a copy of the graph in memory."""
        session = self._session
        found: list[str] = []
        count = len(session.get_outputs())
        if names:
            graph, found = _with_outputs(self.path, names)
            session = self._load(graph)
        feeds = {
            value.name: tensor.detach().contiguous().numpy()
            for value, tensor in zip(session.get_inputs(), inputs)
        }
        results = [torch.from_numpy(array) for array in session.run(None, feeds)]
        return results[:count], dict(zip(found, results[count:]))


def _with_outputs(path: Path, names: Sequence[str]) -> tuple[bytes, list[str]]:
    """The file with more outputs, and those of the names that it has."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    present = {name for node in model.graph.node for name in node.output}
    types = {value.name: value for value in model.graph.value_info}
    outputs = {value.name for value in model.graph.output}
    found = [name for name in names if name in present - outputs]
    for name in found:
        model.graph.output.append(types.get(name) or onnx.ValueInfoProto(name=name))
    return model.SerializeToString(), found

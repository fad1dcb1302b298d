"""ONNX files in TensorRT, where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtoolkit.export.errors import VerificationError


def why_no_engine() -> str:
    """What keeps an engine from being built here; "" if nothing does."""
    if importlib.util.find_spec("tensorrt") is None:
        return "tensorrt is not installed (pip install tensorrt)"
    return "" if torch.cuda.is_available() else "PyTorch finds no CUDA device"


def _on_device(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().cuda()


def _run(context: Any) -> bool:
    """Executes with the addresses that are set, and waits."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    done = context.execute_async_v3(stream.cuda_stream)
    stream.synchronize()
    return bool(done)


class TensorRtEngine:
    """A file as an engine of TensorRT on the current CUDA device.

    The network is strongly typed: what the file computes on codes is integer, the rest is float32,
    without TF32. The engine is built at the first run, for batches up to that run's, and again
    when a larger one comes.

    Attributes:
        version: TensorRT's name and version, and the device's.
    """

    def __init__(self, path: Path) -> None:
        import tensorrt

        self.path = path
        self.trt = tensorrt
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
        self.version = f"TensorRT {tensorrt.__version__} ({device})"
        self._logger = tensorrt.Logger(tensorrt.Logger.ERROR)
        self._engine: Any = None
        self._context: Any = None
        #: The largest shapes that the engine takes.
        self._largest: list[tuple[int, ...]] = []

    def _parsed(self, builder: Any) -> tuple[Any, Any]:
        """The network, and the parser that it needs to live."""
        flag = self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        network = builder.create_network(1 << int(flag))
        parser = self.trt.OnnxParser(network, self._logger)
        if not parser.parse_from_file(str(self.path)):
            errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
            raise VerificationError(f"TensorRT's parser refuses the file: {errors}")
        return network, parser

    def _build(self, shapes: list[tuple[int, ...]]) -> None:
        builder = self.trt.Builder(self._logger)
        network, _parser = self._parsed(builder)
        config = builder.create_builder_config()
        config.clear_flag(self.trt.BuilderFlag.TF32)
        profile = builder.create_optimization_profile()
        for index, shape in enumerate(shapes):
            value = network.get_input(index)
            least = tuple(1 if size == -1 else size for size in value.shape)
            if -1 in tuple(value.shape):
                profile.set_shape(value.name, least, shape, shape)
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise VerificationError("TensorRT cannot build an engine of the file: see its log")
        self._engine = self.trt.Runtime(self._logger).deserialize_cuda_engine(plan)
        self._context = self._engine.create_execution_context()
        self._largest = shapes

    def run(
        self, inputs: list[Tensor], names: Sequence[str]
    ) -> tuple[list[Tensor], Mapping[str, Tensor]]:
        """See ``verify.Runner``; it gives no codes, as an engine that gave them would be another.

        Raises:
            VerificationError: the file cannot be built or executed.
        """
        shapes = [tuple(tensor.shape) for tensor in inputs]
        if self._context is None or not self._takes(shapes):
            self._build(shapes)
        engine, context = self._engine, self._context
        every = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        is_input = {
            name: engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT for name in every
        }
        values = dict(zip((name for name in every if is_input[name]), map(_on_device, inputs)))
        for name, tensor in values.items():
            context.set_input_shape(name, tuple(tensor.shape))
        for name in (name for name in every if not is_input[name]):
            dtype = getattr(torch, self._dtypes()[engine.get_tensor_dtype(name)])
            shape = tuple(context.get_tensor_shape(name))
            device = next(iter(values.values())).device
            values[name] = torch.empty(shape, dtype=dtype, device=device)
        for name, tensor in values.items():
            context.set_tensor_address(name, tensor.data_ptr())
        if not _run(context):
            raise VerificationError("TensorRT cannot execute the engine: see its log")
        return [tensor.cpu() for name, tensor in values.items() if not is_input[name]], {}

    def _takes(self, shapes: list[tuple[int, ...]]) -> bool:
        return all(
            size <= most
            for shape, largest in zip(shapes, self._largest)
            for size, most in zip(shape, largest)
        )

    def _dtypes(self) -> dict[Any, str]:
        """PyTorch's names of TensorRT's types."""
        kinds = self.trt.DataType
        return {
            kinds.FLOAT: "float32",
            kinds.HALF: "float16",
            kinds.INT8: "int8",
            kinds.INT32: "int32",
            kinds.INT64: "int64",
            kinds.BOOL: "bool",
            kinds.UINT8: "uint8",
        }

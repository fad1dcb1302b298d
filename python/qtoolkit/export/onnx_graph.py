"""The QDQ form as an ONNX graph.

PyTorch's exporter translates the operators of ATen; quantize and dequantize become operators of a
domain of their own, which no pass of others touches, and at the end QuantizeLinear and
DequantizeLinear.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import torch

from qtoolkit._version import __version__
from qtoolkit.export.four_bits import in_four_bits
from qtoolkit.export.onnx_translate import DOMAIN

_SCOPES = "pkg.torch.onnx.name_scopes"


class Lowering:
    """Passes over one translated graph, which they change in place.

    Attributes:
        biases: "int32" keeps biases as codes, "float32" makes floats of them.
        clips: where a value is clipped to fewer codes than its storage has, "codes" (after
            QuantizeLinear) or "float" (before).
        int4: store weights in 4 bits whose codes fit.
        onnxruntime: suit the fusions of ONNX Runtime. Linear layers of more than two dimensions
            are Gemm on rows, as it adds a bias to codes nowhere else; softmax stays in float, as
            on codes it is an approximation, and slower.
    """

    def __init__(
        self,
        model: Any,
        *,
        biases: str = "int32",
        clips: str = "codes",
        int4: bool = False,
        onnxruntime: bool = True,
    ) -> None:
        self.model = model
        self.graph = model.graph
        self.biases, self.clips, self.int4 = biases, clips, int4
        self.onnxruntime = onnxruntime
        #: Names that are taken, of values.
        self.names: set[str] = set()
        #: Initializers by what they hold, and by what they were made from.
        self.stored: dict[Any, Any] = {}

    def run(self) -> None:
        """All passes, in order."""
        from onnx_ir.passes import common
        from onnxscript import optimizer

        optimizer.optimize(self.model)
        self._name_nodes()
        for node in list(self.graph):
            if node.op_type == "Reshape":
                self._constant_shape(node)
            elif node.op_type == "ReduceMean":
                self._global_pool(node)
            elif node.op_type == "Transpose":
                self._transposed_weight(node)
            elif node.op_type in ("Relu", "Clip") and self.clips == "codes":
                self._clip_codes(node)
        if self.onnxruntime:
            for node in list(self.graph):
                if node.op_type == "Add":
                    self._linear(node)
                elif node.op_type == "Softmax":
                    self._float_softmax(node)
        common.RemoveUnusedNodesPass()(self.model)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(self.model)
        self._lower_all()
        common.RemoveUnusedNodesPass()(self.model)
        common.ClearMetadataAndDocStringPass()(self.model)
        self._separate_node_names()
        self.graph.opset_imports.pop(DOMAIN, None)
        self.model.opset_imports.pop(DOMAIN, None)
        self.model.producer_name = "qtoolkit"
        self.model.producer_version = __version__
        self.model.metadata_props["qtoolkit.version"] = __version__
        self.model.metadata_props["qtoolkit.pytorch"] = str(torch.__version__)

    # Building

    def _before(self, node: Any, kind: str, inputs: list[Any], **attributes: Any) -> Any:
        """A new node before another one; gives its output."""
        import onnx_ir as ir

        new = ir.node(kind, inputs, attributes=attributes)
        scope = (node.name or "").rpartition("/")[0]
        new.name = f"{scope}/{kind}" if scope else kind
        self.graph.insert_before(node, new)
        return new.outputs[0]

    def _replace(self, node: Any, value: Any) -> None:
        import onnx_ir as ir

        old = node.outputs[0]
        value.type, value.shape = value.type or old.type, value.shape or old.shape
        is_output = old.is_graph_output()
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=is_output)
        self.graph.remove(node, safe=True)

    def _unique(self, name: str) -> str:
        free, count = name, 1
        while free in self.names:
            count += 1
            free = f"{name}_{count}"
        self.names.add(free)
        return free

    def _initializer(self, name: str, array: Any, dtype: Any = None) -> Any:
        """An initializer; large arrays of equal values are stored once."""
        import onnx_ir as ir

        key = (str(dtype or array.dtype), array.shape, array.tobytes())
        if array.nbytes > 64 and key in self.stored:
            return self.stored[key]
        tensor = ir.tensor(array, dtype=dtype)
        value = ir.Value(
            name=self._unique(name),
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(array.shape),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        self.stored[key] = value
        return value

    def _zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Zero points of weights, shared by all of a size: without them ONNX Runtime does not fuse
        a linear layer."""
        key = ("zeros", shape, str(dtype))
        if key not in self.stored:
            kind = "int8" if dtype is None else "int4"
            name = "_".join(["zero_points", kind, *map(str, shape)])
            self.stored[key] = self._initializer(name, np.zeros(shape, np.int8), dtype)
        return self.stored[key]

    # Floats

    def _name_nodes(self) -> None:
        """Names nodes by module and operator."""
        used: dict[str, int] = {}
        for node in self.graph:
            found = re.findall(r"'([^']*)'", node.metadata_props.get(_SCOPES, ""))
            scope = found[-2].removesuffix(".layer") if len(found) > 1 else ""
            name = f"{scope}/{node.op_type}" if scope else node.op_type
            used[name] = used.get(name, 0) + 1
            node.name = name if used[name] == 1 else f"{name}_{used[name]}"

    def _separate_node_names(self) -> None:
        """ONNX Runtime refuses two nodes of one name."""
        used: set[str] = set()
        for node in self.graph:
            name, count = node.name or node.op_type, 1
            free = name
            while free in used:
                count += 1
                free = f"{name}_{count}"
            used.add(free)
            node.name = free

    def _constant_shape(self, node: Any) -> None:
        """A computed shape with one unknown size is a constant with -1."""
        output = node.outputs[0]
        if output.shape is None or node.inputs[1].const_value is not None:
            return
        sizes = [size if isinstance(size, int) else -1 for size in output.shape]
        if sizes.count(-1) > 1 or 0 in sizes:
            return
        node.replace_input_with(1, self._constant(node, sizes))

    def _global_pool(self, node: Any) -> None:
        """A mean over height and width is GlobalAveragePool, for which runtimes have kernels."""
        x, axes = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
        value = None if axes is None else axes.const_value
        if x.shape is None or len(x.shape) != 4 or value is None:
            return
        if sorted(int(axis) % 4 for axis in value.numpy().reshape(-1)) != [2, 3]:
            return
        pooled = self._before(node, "GlobalAveragePool", [x])
        if not node.attributes.get_int("keepdims", 1):
            pooled = self._requantized_before(node, pooled)
            pooled = self._before(node, "Flatten", [pooled], axis=1)
        self._replace(node, pooled)

    def _requantized_before(self, node: Any, value: Any) -> Any:
        """The value with the quantization that what follows a node gives its result."""
        readers = node.outputs[0].consumers()
        if len(readers) != 1 or readers[0].op_type != "Quantize":
            return value
        name = readers[0].attributes["name"].as_string()
        return self._quantized_as(node, value, readers[0], f"{name}.{node.op_type.lower()}")

    def _quantized_as(self, node: Any, value: Any, quantize: Any, name: str) -> Any:
        """The value, before a node, quantized and dequantized as by another Quantize."""
        attributes = {key: quantize.attributes[key].as_int() for key in ("quant_min", "quant_max")}
        parameters = list(quantize.inputs[1:])
        codes = self._custom_before(
            node, "Quantize", [value, *parameters], {**attributes, "name": name}
        )
        codes.dtype = quantize.outputs[0].dtype
        return self._custom_before(node, "Dequantize", [codes, *parameters], {"axis": -1})

    def _linear(self, node: Any) -> None:
        """A product of codes with a matrix, and its bias, as Gemm on rows."""
        product, bias = (value.producer() for value in node.inputs)
        if product is None or product.op_type != "MatMul" or not _is_constant(bias):
            return
        x, weight = product.inputs
        source = None if x.producer() is None else x.producer().inputs[0].producer()
        shape = node.outputs[0].shape
        if (
            not _is_constant(weight.producer())
            or len(product.outputs[0].consumers()) != 1
            or source is None
            or source.op_type != "Quantize"
            or shape is None
            or len(shape) < 3
            or sum(not isinstance(size, int) for size in shape) > 1
        ):
            return
        features = weight.producer().inputs[0].const_value.shape[0]
        name = source.attributes["name"].as_string()
        rows = self._reshaped(node, x, [-1, features])
        rows = self._quantized_as(node, rows, source, self._unique(f"{name}.rows"))
        result = self._before(node, "Gemm", [rows, weight, node.inputs[1]])
        readers = node.outputs[0].consumers()
        if len(readers) == 1 and readers[0].op_type == "Quantize":
            name = readers[0].attributes["name"].as_string()
            result = self._quantized_as(node, result, readers[0], self._unique(f"{name}.rows"))
        sizes = [size if isinstance(size, int) else -1 for size in shape]
        self._replace(node, self._reshaped(node, result, sizes))

    def _float_softmax(self, node: Any) -> None:
        """Puts a Clip without bounds, which changes nothing, before a softmax of codes: ONNX
        Runtime fuses DequantizeLinear, Softmax and QuantizeLinear alone."""
        source = node.inputs[0].producer()
        if source is None or source.op_type != "Dequantize":
            return
        node.replace_input_with(0, self._before(node, "Clip", [node.inputs[0]]))

    def _reshaped(self, node: Any, value: Any, sizes: list[int]) -> Any:
        return self._before(node, "Reshape", [value, self._constant(node, sizes)])

    def _constant(self, node: Any, numbers: list[int]) -> Any:
        import onnx_ir as ir

        tensor = ir.tensor(np.asarray(numbers, dtype=np.int64))
        value = self._before(node, "Constant", [], value=tensor)
        value.const_value = tensor
        return value

    def _custom_before(self, node: Any, kind: str, inputs: list[Any], attributes: Any) -> Any:
        import onnx_ir as ir

        new = ir.node(kind, inputs, domain=DOMAIN, attributes=attributes)
        new.name = kind
        self.graph.insert_before(node, new)
        return new.outputs[0]

    def _clip_codes(self, node: Any) -> None:
        """A value that is clipped and quantized is quantized and clipped: then nothing lies between
        a layer and its QuantizeLinear. Not of int8, which ONNX Runtime computes on x86 only where
        DequantizeLinear follows."""
        known = [value is not None and value.const_value is not None for value in node.inputs[1:3]]
        if node.op_type == "Relu":
            limits = [0.0, math.inf]
        elif known == [True, True]:
            limits = [float(value.const_value.numpy()) for value in node.inputs[1:3]]
        else:
            return
        readers = node.outputs[0].consumers()
        if len(readers) != 1 or readers[0].op_type != "Quantize":
            return
        quantize = readers[0]
        if quantize.outputs[0].dtype.numpy() == np.int8:
            return
        scale, zero_point = (float(value.const_value.numpy()) for value in quantize.inputs[1:3])
        low, high = (quantize.attributes[key].as_int() for key in ("quant_min", "quant_max"))
        codes = np.clip(np.rint(np.asarray(limits) / scale) + zero_point, low, high)
        attributes = {
            "quant_min": int(codes[0]),
            "quant_max": int(codes[1]),
            "name": quantize.attributes["name"].as_string(),
        }
        clipped = self._custom_before(
            quantize, "Quantize", [node.inputs[0], *quantize.inputs[1:]], attributes
        )
        clipped.dtype = quantize.outputs[0].dtype
        self._replace(quantize, clipped)

    def _transposed_weight(self, node: Any) -> None:
        """A dequantized matrix that is transposed is the transposed matrix, dequantized."""
        import onnx_ir as ir

        source = node.inputs[0].producer()
        if source is None or source.op_type != "Dequantize":
            return
        codes = source.inputs[0].const_value
        if codes is None or len(codes.shape) != 2:
            return
        turned = ir.Value(
            name=source.inputs[0].name,
            const_value=ir.tensor(np.ascontiguousarray(codes.numpy().T)),
        )
        turned.meta["transposed"] = True
        axis = source.attributes["axis"].as_int()
        value = self._custom_before(
            node, "Dequantize", [turned, source.inputs[1]], {"axis": axis if axis < 0 else 1 - axis}
        )
        self._replace(node, value)

    # Quantize and dequantize

    def _name_values(self) -> set[str]:
        """Names floats apart from codes; gives the prefixes that the constants of layers have."""
        prefixes = set()
        for node in self.graph:
            if node.op_type == "Quantize" and node.domain == DOMAIN:
                self.names.add(node.attributes["name"].as_string())
            if node.op_type == "Dequantize" and node.inputs[0].const_value is not None:
                name = node.inputs[0].name or ""
                if ".layer." in name:
                    prefixes.add(name.rpartition(".")[0])
        self._rename_floats(prefixes)
        return prefixes

    def _layer_and_name(self, node: Any, prefixes: set[str]) -> tuple[str, str]:
        """Of the constant that a node dequantizes."""
        prefix, _, last = (node.inputs[0].name or "").rpartition(".")
        layer = prefix.removesuffix(".layer") if prefix in prefixes else prefix
        return layer, f"{layer}.{last}" if layer else last

    def _lower_all(self) -> None:
        prefixes = self._name_values()
        for node in list(self.graph):
            if node.domain != DOMAIN:
                continue
            if node.op_type == "Quantize":
                self._lower_quantize(node)
            elif node.inputs[0].const_value is not None:
                self._lower_constant(node, prefixes)
            else:
                self._lower_dequantize(node)

    def _rename_floats(self, prefixes: set[str]) -> None:
        """Names of inputs, initializers and values that stay, apart from those of codes."""
        for value in self.graph.inputs:
            value.name = self._unique(value.name)
        for value in list(self.graph.initializers.values()):
            prefix, _, last = value.name.rpartition(".")
            name = f"{prefix.removesuffix('.layer')}.{last}" if prefix in prefixes else value.name
            if any(user.domain != DOMAIN for user in value.consumers()):
                value.name = self._unique(name)
        for node in self.graph:
            if node.domain != DOMAIN:
                for value in node.outputs:
                    value.name = self._unique(value.name or node.name)

    def _parameters(self, node: Any, name: str, dtype: Any) -> list[Any]:
        """Scale and zero point of an activation; movers share those of their source."""
        scale, zero_point = (value.const_value.numpy() for value in node.inputs[1:3])
        key = (node.inputs[1].name, int(zero_point), str(dtype))
        if key not in self.stored:
            self.stored[key] = [
                self._initializer(f"{name}.scale", scale.reshape(()).astype(np.float32)),
                self._initializer(f"{name}.zero_point", zero_point.reshape(()).astype(dtype)),
            ]
        return self.stored[key]

    def _lower_quantize(self, node: Any) -> None:
        name = node.attributes["name"].as_string()
        low, high = (node.attributes[key].as_int() for key in ("quant_min", "quant_max"))
        dtype = node.outputs[0].dtype.numpy()
        parameters = self._parameters(node, name, dtype)
        limits = np.iinfo(dtype)
        clipped = (low, high) != (limits.min, limits.max)
        x, shape = node.inputs[0], node.outputs[0].shape
        node.name = f"{name}/Quantize"
        if clipped and self.clips == "float":
            scale, zero_point = (value.const_value.numpy() for value in parameters)
            bounds = [
                self._initializer(
                    f"{name}.{key}", np.float32((bound - int(zero_point)) * np.float64(scale))
                )
                for key, bound in (("low", low), ("high", high))
            ]
            x = self._before(node, "Clip", [x, *bounds])
            x.name = self._unique(f"{name}.clipped")
            x.type, x.shape = node.inputs[0].type, shape
        codes = self._before(node, "QuantizeLinear", [x, *parameters])
        if clipped and self.clips == "codes":
            codes.name = self._unique(f"{name}.unclipped")
            codes.type, codes.shape = node.outputs[0].type, shape
            bounds = [
                self._initializer(f"{name}.quant_{key}", np.asarray(bound, dtype=dtype))
                for key, bound in (("min", low), ("max", high))
            ]
            codes = self._before(node, "Clip", [codes, *bounds])
        codes.name = name
        codes.meta["parameters"] = parameters
        self._replace(node, codes)

    def _lower_dequantize(self, node: Any) -> None:
        codes = node.inputs[0]
        node.name = f"{codes.name}/Dequantize"
        parameters = codes.meta.get("parameters")
        if parameters is None:
            parameters = self._parameters(node, codes.name, codes.dtype.numpy())
        value = self._before(node, "DequantizeLinear", [codes, *parameters])
        value.name = self._unique(f"{codes.name}.dequantized")
        self._replace(node, value)

    def _lower_constant(self, node: Any, prefixes: set[str]) -> None:
        """A weight or bias."""
        import onnx_ir as ir

        codes = node.inputs[0].const_value.numpy()
        scale = node.inputs[1].const_value.numpy()
        axis = node.attributes["axis"].as_int()
        _, name = self._layer_and_name(node, prefixes)
        shape = [-1 if dim == axis else 1 for dim in range(codes.ndim)]
        # No operator has scales along several dimensions, as a grouped transposed convolution's.
        spread = axis < 0 and scale.size > 1
        if spread or (codes.dtype == np.int32 and self.biases == "float32"):
            shape = scale.shape if spread else shape
            real = (codes.astype(np.float64) * scale.reshape(shape)).astype(np.float32)
            self._replace(node, self._initializer(name, real))
            return
        dtype = None
        small = in_four_bits(codes, axis) if self.int4 and codes.dtype == np.int8 else None
        if small is not None:
            codes, scale, dtype = small[0], scale * small[1].reshape(-1), ir.DataType.INT4
        node.name = f"{name}/Dequantize"
        scale = scale.astype(np.float32).reshape(-1 if axis >= 0 else ())
        inputs = [
            self._initializer(name, codes, dtype),
            self._initializer(f"{name}_scale", scale),
        ]
        if codes.dtype == np.int8:
            inputs.append(self._zeros(scale.shape, dtype))
        attributes = {"axis": axis} if axis >= 0 else {}
        value = self._before(node, "DequantizeLinear", inputs, **attributes)
        value.name = self._unique(f"{name}.dequantized")
        self._replace(node, value)


def _is_constant(node: Any) -> bool:
    """Whether a node dequantizes a weight or a bias."""
    return (
        node is not None and node.op_type == "Dequantize" and node.inputs[0].const_value is not None
    )


def byte_count(model: Any) -> int:
    """Bytes of all initializers."""
    return sum(
        math.ceil(value.const_value.size * value.const_value.dtype.itemsize)
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )

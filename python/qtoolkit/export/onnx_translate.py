"""PyTorch's ONNX exporter with the operators of the QDQ form."""

from __future__ import annotations

import contextlib
import io
import re
import warnings as python_warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from qtoolkit.export.errors import UnsupportedError
from qtoolkit.export.program import DEQUANTIZE, QUANTIZE, QdqProgram

#: The domain of quantize and dequantize in a translated graph.
DOMAIN = "qtoolkit"


@lru_cache
def _translations() -> dict[Any, Callable[..., Any]]:
    """What PyTorch's exporter makes of the two operators."""
    import onnx.defs
    from onnxscript import values

    schema = onnx.defs.OpSchema
    optional = schema.FormalParameterOption.Optional
    types = [f"tensor({name})" for name in ("float", "uint8", "int8", "int32")]
    domain = values.Opset(DOMAIN, 1)

    def operator(kind: str, /, **attributes: Any) -> Any:
        return values.Op(
            domain,
            kind,
            schema(
                kind,
                DOMAIN,
                1,
                inputs=[
                    schema.FormalParameter("x", "T"),
                    schema.FormalParameter("scale", "S"),
                    schema.FormalParameter("zero_point", "Z", param_option=optional),
                ],
                outputs=[schema.FormalParameter("y", "Y")],
                type_constraints=[(letter, types, "") for letter in "TSZY"],
                attributes=[
                    schema.Attribute(key, value, "", required=False)
                    for key, value in attributes.items()
                ],
            ),
        )

    kinds = schema.AttrType
    quantize = operator("Quantize", quant_min=kinds.INT, quant_max=kinds.INT, name=kinds.STRING)
    dequantize = operator("Dequantize", axis=kinds.INT)

    def translate_quantize(
        x: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int, name: str
    ) -> Any:
        return quantize(x, scale, zero_point, quant_min=quant_min, quant_max=quant_max, name=name)

    def translate_dequantize(
        codes: Any, scale: Any, zero_point: Any = None, axis: int | None = None
    ) -> Any:
        return dequantize(codes, scale, zero_point, axis=-1 if axis is None else axis)

    return {QUANTIZE: translate_quantize, DEQUANTIZE: translate_dequantize}


def translate(program: QdqProgram, opset: int) -> Any:
    """The program as an ``onnx_ir.Model``, with the two operators in a domain of their own.

    Raises:
        UnsupportedError: an operator has no translation; names it and the module that calls it.
    """
    silent = io.StringIO()
    try:
        with (
            python_warnings.catch_warnings(),
            contextlib.redirect_stdout(silent),
            contextlib.redirect_stderr(silent),
        ):
            python_warnings.simplefilter("ignore")
            result = torch.onnx.export(
                program.exported,
                (),
                dynamo=True,
                opset_version=opset,
                custom_translation_table=_translations(),
                optimize=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        chain: list[BaseException] = [error]
        while chain[-1].__cause__ is not None:
            chain.append(chain[-1].__cause__)
        cause = str(chain[-1]).splitlines()[0]
        found = re.search(r"OpOverload\(op='([\w.:]+)', overload='(\w+)'\)", str(chain[-1]))
        if found is None:
            raise UnsupportedError(f"PyTorch's ONNX exporter cannot translate: {cause}") from error
        operator = f"{found[1].replace('::', '.')}.{found[2]}"
        users = [node for node in program.graph.nodes if str(node.target) == operator]
        place = "an operator that PyTorch decomposed"
        if users:
            place = program.module_of(users[0]) or "the model's own forward"
        raise UnsupportedError(
            f"{operator} in {place} has no ONNX translation: express it in other operators"
        ) from error
    assert result is not None
    return result.model

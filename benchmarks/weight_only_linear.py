"""A linear layer with 4-bit weights beside ONNX Runtime's, PyTorch's and torch.ao's, interleaved.

    python benchmarks/weight_only_linear.py --threads 1
    python benchmarks/weight_only_linear.py --threads 2 --rows 1 16 128

qtoolkit (activations as they are, "exact", and rounded to int8, "int8"), ONNX Runtime's MatMulNBits
(accuracy level 4: activations rounded to int8) and PyTorch's int4 (bfloat16 activations) multiply
by the same codes, symmetric in groups; torch.ao's dynamic INT8 by int8 weights of the same layer.
All take turns in every round. ONNX Runtime takes part where it is installed (pip install onnx
onnxruntime).
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import _machine


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 32, 64, 128, 512])
    parser.add_argument("--in-features", type=int, default=4096)
    parser.add_argument("--out-features", type=int, default=11008)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--path", help="the qtoolkit kernel path to force, such as avx512vnni")
    parser.add_argument("--no-write", action="store_true", help="leave benchmarks/results alone")
    return parser.parse_args()


args = parse_arguments()
os.environ.update(_machine.environment("native", args.threads))  # before any library starts

import _bench  # noqa: E402
import torch  # noqa: E402
from _common import markdown_table, time_interleaved  # noqa: E402  (examples/)
from torch import Tensor, nn  # noqa: E402

import qtoolkit as qt  # noqa: E402
from qtoolkit.nn.weight_only import QuantizedWeightLinear  # noqa: E402

Layer = Callable[[Tensor], Any]
OURS = ("qtoolkit int8", "qtoolkit exact")


def quantized(linear: nn.Linear, accumulate: str) -> QuantizedWeightLinear:
    model = nn.Sequential(linear)
    small = qt.quantize_weights(
        model, "int4", args.group_size, symmetric=True, accumulate=accumulate, progress=False
    )
    return small[0]


def onnxruntime(layer: QuantizedWeightLinear) -> Layer:
    """MatMulNBits on the same codes; without zero points it takes 8 for each."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    out_features, in_features = layer.shape
    blocks = layer.codes.numpy().reshape(out_features, -1, args.group_size // 2)
    tensors = [
        numpy_helper.from_array(blocks, "codes"),
        numpy_helper.from_array(layer.scale.numpy().reshape(-1), "scale"),
    ]
    sizes = {"K": in_features, "N": out_features, "bits": 4, "block_size": args.group_size}
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scale"],
        ["y"],
        domain="com.microsoft",
        accuracy_level=4,
        **sizes,
    )
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["M", width])
        for name, width in (("x", in_features), ("y", out_features))
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "linear", [x], [y], tensors)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = args.threads, 1
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda x: session.run(None, {"x": x.numpy()})[0]


def pytorch_int4(layer: QuantizedWeightLinear) -> Layer:
    codes = qt.ops.unpack_codes(layer.codes, 4, layer.in_features).int()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scale = layer.scale.t().contiguous()
    terms = torch.stack([scale, torch.zeros_like(scale)], -1).bfloat16()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(
        x.bfloat16(), packed, args.group_size, terms
    )


def layers(linear: nn.Linear) -> dict[str, Layer]:
    exact = quantized(linear, "float32")
    makers: dict[str, Callable[[], Layer]] = {
        "qtoolkit int8": lambda: quantized(linear, "int8"),
        "qtoolkit exact": lambda: exact,
        "ONNX Runtime 4-bit": lambda: onnxruntime(exact),
        "PyTorch int4": lambda: pytorch_int4(exact),
    }
    for engine in sorted(set(torch.backends.quantized.supported_engines) - {"none", "qnnpack"}):
        makers[f"torch.ao {engine}"] = lambda engine=engine: _bench.torch_ao_dynamic(linear, engine)
    made = {}
    for name, make in makers.items():
        try:
            layer = make()
            layer(torch.randn(1, linear.in_features))
            made[name] = layer
        except Exception as error:  # a peer that is absent or broken is named, not fatal
            if name in OURS:
                raise
            print(f"left out: {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
    return made


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    if args.path:
        qt._C.force_path(args.path)
    torch.manual_seed(0)
    linear = nn.Linear(args.in_features, args.out_features, bias=False)
    known = _bench.facts()
    print(_bench.describe(known))

    table, results = [], {}
    with torch.inference_mode():
        made = layers(linear)
        for count in args.rows:
            x = torch.randn(count, args.in_features)
            reference = linear(x)
            sqnr = {
                name: _bench.sqnr_db(reference, torch.as_tensor(layer(x)).float())
                for name, layer in made.items()
            }
            runs = {name: (lambda layer=layer, x=x: layer(x)) for name, layer in made.items()}
            samples = time_interleaved(runs, args.rounds, seconds=0.03)
            best = {name: min(values) for name, values in samples.items()}
            median = {name: statistics.median(values) for name, values in samples.items()}
            ours = OURS[0]
            engines = [name for name in made if name.startswith("torch.ao")]
            results[count] = {
                "min_ms": best,
                "median_ms": median,
                "sqnr_db": sqnr,
                "int8_of_onnxruntime": ratio(best, median, ours, ["ONNX Runtime 4-bit"]),
                "int8_of_best_torch_ao": ratio(best, median, ours, engines),
                "exact_of_pytorch_int4": ratio(best, median, OURS[1], ["PyTorch int4"]),
            }
            table += [
                [
                    f"{count} rows: {name}",
                    f"{best[name]:.3f}",
                    f"{median[name]:.3f}",
                    f"{best[name] / best[ours]:.2f}",
                    f"{median[name] / median[ours]:.2f}",
                    f"{sqnr[name]:.1f}",
                ]
                for name in made
            ]
            lines = [f"{key} {results[count][key]}" for key in list(results[count])[3:]]
            print(f"{count} rows: " + "; ".join(lines), flush=True)
    header = ["", "min ms", "median ms", "of qtoolkit int8's (min)", "(median)", "SQNR dB"]
    text = markdown_table(header, table)
    print(text)
    if args.no_write:
        return
    _bench.write_json(
        f"weight_only_linear_threads{args.threads}",
        {
            **known,
            "title": f"Linear with 4-bit weights, {args.in_features} to {args.out_features}, "
            f"groups of {args.group_size}, {args.threads} thread(s)",
            "command": f"python benchmarks/weight_only_linear.py --threads {args.threads}",
            "table": text,
            "notes": [
                "Times as multiples of `qtoolkit int8`'s; SQNR against the float layer on normal "
                "weights and inputs. torch.ao's weights have 8 bits."
            ],
            "facts": _bench.describe(known),
            "rounds": args.rounds,
            "rows": results,
        },
    )


def ratio(
    best: dict[str, float], median: dict[str, float], ours: str, peers: list[str]
) -> list[float] | None:
    """Our time over the fastest peer's, as [of the least times, of the medians]."""
    present = [name for name in peers if name in best]
    if not present:
        return None
    return [
        round(times[ours] / min(times[name] for name in present), 3) for times in (best, median)
    ]


if __name__ == "__main__":
    main()

"""A dynamically quantized linear layer beside torch.ao's engines and ONNX Runtime, interleaved.

    python benchmarks/dynamic_linear.py --threads 1
    python benchmarks/dynamic_linear.py --threads 2 --isa avx512vnni

All quantize the weights of the same float layer, by their own rules, and take turns in every round.
`--isa avx512vnni` holds everything to AVX512-VNNI (_machine.py says how); `native` lets each take
what it likes, AMX where the CPU has it. ONNX Runtime takes part where it is installed
(pip install onnx onnxruntime).
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable

import _machine

Run = Callable[[], object]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--in-features", type=int, default=4096)
    parser.add_argument("--out-features", type=int, default=11008)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", choices=("native", "avx512vnni"), default="native")
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args()


args = parse_arguments()
# Before any library starts.
os.environ.update(_machine.environment(args.isa, args.threads))
if args.isa != "native":
    _machine.refuse_amx()

import _bench  # noqa: E402
import torch  # noqa: E402
from _common import markdown_table, time_interleaved  # noqa: E402  (examples/)
from torch import Tensor, nn  # noqa: E402

import qtoolkit as qt  # noqa: E402

Layer = Callable[[Tensor], object]


def onnxruntime(linear: nn.Linear, per_channel: bool) -> Layer:
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime.quantization import QuantType, quantize_dynamic

    weight = numpy_helper.from_array(linear.weight.detach().t().contiguous().numpy(), "weight")
    bias = numpy_helper.from_array(linear.bias.detach().numpy(), "bias")
    shapes = {"x": ["M", linear.in_features], "y": ["M", linear.out_features]}
    values = {
        n: [helper.make_tensor_value_info(n, TensorProto.FLOAT, s)] for n, s in shapes.items()
    }
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "linear", values["x"], values["y"], [weight, bias])
    opset = [helper.make_opsetid("", 17)]
    with tempfile.TemporaryDirectory() as folder:
        floats, file = f"{folder}/float.onnx", f"{folder}/int8.onnx"
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), floats)
        quantize_dynamic(floats, file, per_channel=per_channel, weight_type=QuantType.QInt8)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = args.threads, 1
        session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x.numpy()})[0]


def layers(linear: nn.Linear) -> dict[str, Layer]:
    makers: dict[str, Callable[[], Layer]] = {
        "PyTorch FP32": lambda: linear,
        "qtoolkit": lambda: qt.quantize_dynamic(nn.Sequential(linear)),
    }
    for engine in sorted(set(torch.backends.quantized.supported_engines) - {"none"}):
        makers[f"torch.ao {engine}"] = lambda engine=engine: _bench.torch_ao_dynamic(linear, engine)
    for scales in ("per tensor", "per channel"):
        makers[f"ONNX Runtime {scales}"] = lambda scales=scales: onnxruntime(
            linear, scales == "per channel"
        )
    made = {}
    for name, make in makers.items():
        try:
            made[name] = make()
            made[name](torch.randn(1, linear.in_features))
        except Exception as error:  # a peer that is absent or broken is named, not fatal
            if name == "qtoolkit":
                raise
            made.pop(name, None)
            print(f"left out: {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
    return made


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    if args.isa != "native":
        qt._C.force_path(args.isa)
    torch.manual_seed(0)
    linear = nn.Linear(args.in_features, args.out_features)
    known = _bench.facts()
    print(f"{args.in_features} -> {args.out_features}, {args.isa}; {_bench.describe(known)}")

    rows, results = [], {}
    with torch.inference_mode():
        made = layers(linear)
        for count in args.rows:
            x = torch.randn(count, args.in_features)
            reference = linear(x)
            sqnr = {n: _bench.sqnr_db(reference, torch.as_tensor(f(x))) for n, f in made.items()}
            runs = {name: (lambda f=f, x=x: f(x)) for name, f in made.items()}
            samples = time_interleaved(runs, args.rounds, seconds=0.03)
            best = {name: min(values) for name, values in samples.items()}
            median = {name: statistics.median(values) for name, values in samples.items()}
            peers = [name for name in made if name.startswith(("torch.ao", "ONNX"))]
            ratios = {
                kind: times["qtoolkit"] / min((times[name] for name in peers), default=float("nan"))
                for kind, times in (("min", best), ("median", median))
            }
            results[count] = {"min_ms": best, "median_ms": median, "sqnr_db": sqnr, **ratios}
            rows += [
                [
                    f"{count} rows: {name}",
                    f"{best[name]:.3f}",
                    f"{median[name]:.3f}",
                    f"{best[name] / best['qtoolkit']:.2f}",
                    f"{median[name] / median['qtoolkit']:.2f}",
                    "-" if name == "PyTorch FP32" else f"{sqnr[name]:.1f}",
                ]
                for name in made
            ]
            print(
                f"{count} rows: qtoolkit takes {ratios['min']:.3f} x the best peer's time (min), "
                f"{ratios['median']:.3f} x (median), on {qt._C.last_path('conv2d')}"
            )
    header = ["", "min ms", "median ms", "of qtoolkit's (min)", "(median)", "SQNR dB"]
    table = markdown_table(header, rows)
    print(table)
    held = "each library's best instructions" if args.isa == "native" else f"all held to {args.isa}"
    command = f"python benchmarks/dynamic_linear.py --threads {args.threads} --isa {args.isa}"
    _bench.write_json(
        f"dynamic_linear_{args.isa}_threads{args.threads}",
        {
            **known,
            "title": f"Dynamic INT8 linear, {args.in_features} to {args.out_features}: {args.isa}, "
            f"{args.threads} thread(s)",
            "command": command,
            "table": table,
            "notes": [f"Times as multiples of qtoolkit's; {held}."],
            "facts": _bench.describe(known),
            "isa": args.isa,
            "rounds": args.rounds,
            "rows": results,
        },
    )


if __name__ == "__main__":
    main()

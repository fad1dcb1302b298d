"""The networks that benchmarks/models.py times: FP32, qtoolkit, and other INT8 runtimes.

Each maker returns candidates: a name, a call without arguments that gives the logits, and after it
a function that says what really ran.
"""

from __future__ import annotations

import collections
import copy
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import _layers
import _torch_ao  # (examples/)
import torch
from torch import Tensor, nn

import qtoolkit as qt


@dataclass
class Job:
    """What all candidates of one process run."""

    model: nn.Module
    images: Tensor
    calibration: list[Tensor]
    threads: int
    isa: str


@dataclass
class Candidate:
    name: str
    run: Callable[[], object]
    evidence: Callable[[], str] = lambda: ""
    layers: Callable[[], list[_layers.Layer]] | None = None


def _batches(job: Job) -> list[Tensor]:
    """The calibration images in batches of the images' size, for graphs that take no other."""
    size, images = len(job.images), torch.cat(job.calibration)
    whole = images.repeat(-(-size // len(images)), 1, 1, 1).split(size)
    return [batch for batch in whole if len(batch) == size]


def _with_torch(model: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.inference_mode():
            return model(images)

    return run


def _printed_by(run: Callable[[], object]) -> str:
    """What C++ code prints to standard output meanwhile."""
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            run()
        finally:
            os.dup2(kept, 1)
            os.close(kept)
        file.seek(0)
        return file.read().decode()


def count_implementations(verbose: str) -> collections.Counter[str]:
    """How often each implementation of a convolution or product runs in oneDNN's verbose output."""
    line = re.compile(
        r"^onednn_verbose,(?:.*,)?exec,cpu,(?:convolution|matmul|inner_product),([^,]+)", re.M
    )
    return collections.Counter(line.findall(verbose))


def _listed(counts: collections.Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def _onednn_evidence(run: Callable[[], object]) -> Callable[[], str]:
    def evidence() -> str:
        def verbosely() -> None:
            with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
                run()

        return _listed(count_implementations(_printed_by(verbosely))) or "no oneDNN primitive"

    return evidence


def torch_fp32(job: Job) -> Iterator[Candidate]:
    run = _with_torch(job.model, job.images)
    yield Candidate("PyTorch FP32", run, _onednn_evidence(run))
    nhwc = copy.deepcopy(job.model).to(memory_format=torch.channels_last)
    run = _with_torch(nhwc, job.images.to(memory_format=torch.channels_last))
    yield Candidate("PyTorch FP32 channels_last", run, _onednn_evidence(run))


def qtoolkit(job: Job) -> Iterator[Candidate]:
    mapping = qt.get_default_qconfig_mapping("x86")
    prepared = qt.prepare(job.model, mapping, example_inputs=(job.images,))
    qt.calibrate(prepared, job.calibration, progress=False)
    converted = qt.convert(prepared)
    if job.isa != "native":
        qt._C.force_path(job.isa)

    def paths() -> str:
        kernels = ("conv2d", "conv2d_depthwise")
        return ", ".join(f"{k} {path}" for k in kernels if (path := qt._C.last_path(k)))

    def layers() -> list[_layers.Layer]:
        return _layers.of_modules(converted, job.images)

    yield Candidate("qtoolkit eager", _with_torch(converted, job.images), paths, layers)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pt"
        qt.export.torchscript(converted, file, example_inputs=(job.images,))
        scripted = torch.jit.load(file)
    yield Candidate("qtoolkit scripted", _with_torch(scripted, job.images), paths)
    if hasattr(qt, "compile"):

        def steps() -> list[_layers.Layer]:
            profiled = qt.compile(converted, example_inputs=(job.images,), profile=True)
            return _layers.of_plan(profiled.plan)

        plan = qt.compile(converted, example_inputs=(job.images,))
        yield Candidate("qtoolkit plan", _with_torch(plan, job.images), paths, steps)


def torch_ao(job: Job) -> Iterator[Candidate]:
    labelled = [(images, torch.zeros(len(images))) for images in job.calibration]
    for engine in ("fbgemm", "x86", "onednn"):
        scripted = _torch_ao.ptq(job.model, labelled, len(labelled), engine)

        def run(scripted: nn.Module = scripted, engine: str = engine) -> Tensor:
            torch.backends.quantized.engine = engine
            with torch.inference_mode():
                return scripted(job.images)

        yield Candidate(f"torch.ao {engine}", run, _onednn_evidence(run))


def torchao(job: Job) -> Iterator[Candidate]:
    import torch._inductor.config
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    nhwc = job.images.to(memory_format=torch.channels_last)
    with torch.no_grad():
        # Strict, else the quantizer takes a ReLU module that is called twice for one.
        exported = torch.export.export(copy.deepcopy(job.model), (nhwc,), strict=True).module()
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(exported, quantizer)
        for batch in _batches(job):
            prepared(batch.to(memory_format=torch.channels_last))
        torch._inductor.config.freezing = True
        compiled = torch.compile(convert_pt2e(prepared))

    def run() -> Tensor:
        with torch.no_grad():  # without it the model is compiled again, in float
            return compiled(nhwc)

    yield Candidate("torchao PT2E Inductor", run, _onednn_evidence(run))


def onnxruntime(job: Job) -> Iterator[Candidate]:
    import _machine
    import onnxruntime as ort
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(_batches(job))

        def get_next(self) -> dict | None:
            batch = next(self.batches, None)
            return None if batch is None else {"x": batch.numpy()}

    def session(file: str) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = job.threads, 1
        return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def evidence() -> str:
        if job.isa == "avx2":
            return "MLAS, not held: takes AVX512-VNNI"
        return f"MLAS, AMX {'granted' if _machine.amx_granted() else 'refused'} by Linux"

    with tempfile.TemporaryDirectory() as folder:
        floats, clean = f"{folder}/float.onnx", f"{folder}/clean.onnx"
        torch.onnx.export(
            job.model, (job.images,), floats, input_names=["x"], dynamo=True, external_data=False,
            verbose=False,
        )  # fmt: skip
        quant_pre_process(floats, clean)
        for form in (QuantFormat.QDQ, QuantFormat.QOperator):
            file = f"{folder}/{form.name}.onnx"
            quantize_static(
                clean,
                file,
                Reader(),
                quant_format=form,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
            ready, array = session(file), job.images.numpy()
            yield Candidate(
                f"ONNX Runtime {form.name}",
                lambda ready=ready, array=array: ready.run(None, {"x": array})[0],
                evidence,
            )


def openvino(job: Job) -> Iterator[Candidate]:
    import nncf
    import openvino as ov

    shape = list(job.images.shape)
    converted = ov.convert_model(job.model, example_input=job.images, input=[shape])
    batches = [batch.numpy() for batch in _batches(job)]
    quantized = nncf.quantize(converted, nncf.Dataset(batches), subset_size=len(batches))
    settings = {
        "INFERENCE_NUM_THREADS": job.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = ov.Core().compile_model(quantized, "CPU", settings)
    request, array = compiled.create_infer_request(), job.images.numpy()

    def run() -> object:
        return request.infer({0: array}, share_inputs=True, share_outputs=True)[0]

    def evidence() -> str:
        counts: collections.Counter[str] = collections.Counter()
        for operation in compiled.get_runtime_model().get_ops():
            facts = operation.get_rt_info()
            layer, primitive = (
                str(getattr(facts[k], "value", facts[k])) for k in ("layerType", "primitiveType")
            )
            if layer in ("Convolution", "GroupConvolution", "FullyConnected", "MatMul"):
                counts[primitive] += 1
        return _listed(counts)

    yield Candidate("OpenVINO", run, evidence)


MAKERS: dict[str, tuple[Callable[[Job], Iterator[Candidate]], ...]] = {
    "torch": (torch_ao,),
    "torchao": (torchao,),
    "onnxruntime": (onnxruntime,),
    "openvino": (openvino,),
}

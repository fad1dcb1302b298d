"""The operators in PyTorch's machinery: opcheck, Meta, script, export, threads."""

import io
import math
import subprocess
import sys

import pytest
import torch
from op_reference import random_codes, scale, zero_point
from test_ops_conv2d import make_case
from test_ops_conv_transpose2d import make_case as make_transposed_case
from test_ops_linear import make_case as make_linear_case
from torch import Tensor, nn

from qtoolkit import _library, ops

S, Z = scale(0.05), zero_point(3)
LAST = torch.channels_last


def floats(requires_grad: bool = False) -> Tensor:
    return torch.linspace(-4, 9, 2 * 3 * 4 * 5).view(2, 3, 4, 5).requires_grad_(requires_grad)


def channel_qparams() -> tuple[Tensor, Tensor]:
    return torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 5, -6], dtype=torch.int32)


def group_qparams() -> tuple[Tensor, Tensor]:
    shape = (2, 3, 4, 3)
    return torch.linspace(0.1, 0.9, 72).view(shape), torch.zeros(shape, dtype=torch.int32)


def state(low: float = math.inf, high: float = -math.inf) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.tensor(low), torch.tensor(high), scale(1.0), zero_point(0)


def codes_of_mask() -> Tensor:
    return random_codes((15,))


def parameter(*value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True)


RANGE = (torch.tensor(-1.0), torch.tensor(2.0))
PAIR = (torch.tensor([0.5, 0.2, 0.3]), torch.tensor([1.0, 2.0, 3.0]))


def parameters() -> tuple[Tensor, ...]:
    return tuple(p.clone().requires_grad_() for p in PAIR)


def codes(dtype: torch.dtype = torch.uint8) -> Tensor:
    return random_codes((2, 3, 4, 5), dtype)


def conv_args(geometry: str, **extra: object) -> tuple:
    case = {"relu": False, "residual": None, "residual_scale": None, "residual_zero_point": None}
    return tuple({**make_case(geometry), **case, **extra}.values())


def batch_norm_args(x: Tensor, residual: Tensor | None = None, training: bool = True) -> tuple:
    """With everything that is changed in place where `training`, with nothing else."""
    weight, bias = torch.rand(3).requires_grad_(), torch.rand(3).requires_grad_()
    batch_norm = (weight, bias, torch.zeros(3), torch.ones(3))
    if training:
        state = (torch.tensor(-1.0), torch.tensor(2.0), S.clone(), Z.clone())
        return (x, *batch_norm, residual, True, 0.1, 1e-5, True, 6.0, *state, 0.01, False, 0, 255)
    no_range = (None, None, None, None, 0.0, False, 0, 255)
    return (x, *batch_norm, residual, False, 0.1, 1e-5, False, None, *no_range)


def batch_norm_backward_args(x: Tensor, output_mask: list[bool]) -> tuple:
    mask = random_codes(((x.numel() + 7) // 8,))
    return (x.flip(0), x, None, torch.zeros(3), torch.ones(3), mask, True, output_mask)


SAMPLES = {
    "quantize_per_tensor": [
        (floats(), S, Z, 0, 255),
        (floats().to(memory_format=LAST), S, Z, -128, 127),
    ],
    "quantize_per_channel": [(floats(), *channel_qparams(), 1, -128, 127)],
    "dequantize_per_tensor": [(codes(), S, Z), (codes(torch.int8).to(memory_format=LAST), S, Z)],
    "dequantize_per_channel": [(codes(torch.int8), *channel_qparams(), -3)],
    "fake_quantize_per_tensor": [
        (floats(True), S, Z, 0, 255),
        (floats().to(memory_format=LAST), S, Z, -128, 127),
        (floats().half(), S, Z, 0, 255),
    ],
    "fake_quantize_per_channel": [(floats(True), *channel_qparams(), 1, -128, 127)],
    "fake_quantize_per_group": [
        (floats(True), *group_qparams(), 2, -8, 7),
        (floats().to(memory_format=LAST), *group_qparams(), 2, -8, 7),
    ],
    "fake_quantize_relu": [
        (floats(True), S, Z, 0, 255),
        (floats().to(memory_format=LAST), S, Z, -128, 127),
    ],
    "fake_quantize_mask": [
        (floats(), S, Z, None, None, 0, 255, False),
        (floats().to(memory_format=LAST), *channel_qparams(), 1, None, -128, 127, True),
        (floats().to(memory_format=LAST), *group_qparams(), None, 2, -8, 7, False),
    ],
    "fake_quantize_mask_backward": [
        (floats(True), codes_of_mask(), 0),
        (floats(), codes_of_mask(), 1),
        (floats().bfloat16(), codes_of_mask(), 0),
    ],
    "fake_quantize_mask_backward_": [
        (floats(), codes_of_mask(), 0),
        (floats().to(memory_format=LAST), codes_of_mask(), 1),
    ],
    "observe_fake_quantize": [
        (floats(True), *state(), 0.1, 0, 255, False),
        (floats().to(memory_format=LAST), *state(-1.0, 2.0), 0.1, -127, 127, True),
    ],
    "observe_fake_quantize_mask": [(floats(), *state(), 0.1, 0, 255, False)],
    "fake_quantize_ternary": [
        (floats(True), torch.tensor([0.5]), torch.tensor([1.0]), None),
        (floats().bfloat16().to(memory_format=LAST), *PAIR, 1),
    ],
    "fake_quantize_binary": [
        (floats(True), PAIR[0], 1, 2.0),
        (floats().to(memory_format=LAST), torch.tensor([0.5]), None, 1.0),
    ],
    "fake_quantize_binary_mask": [(floats().to(memory_format=LAST), PAIR[0], 1, 2.0)],
    "fake_quantize_float": [
        (floats(True), torch.tensor([0.5]), None, 1, 0, 6.0),
        (floats(True).to(memory_format=LAST), PAIR[0], -3, 3, -6, 448.0),
    ],
    "fake_quantize_float_mask": [(floats().half(), PAIR[0], 1, 1, 0, 6.0)],
    "fake_quantize_block_float": [
        (floats(True), None, 2, 1, 0, 6.0, "e8m0"),
        (floats().to(memory_format=LAST), None, 3, 1, 0, 6.0, "e4m3"),
        (floats().half(), torch.tensor([0.01]), 16, 1, 0, 6.0, "e4m3"),
    ],
    "fake_quantize_lsq": [
        (floats(True), parameter(0.5), None, None, -8, 7, 0.1),
        (floats(True).to(memory_format=LAST), *parameters(), 1, 0, 15, 1.0),
        (floats().half(), torch.tensor([0.5]), torch.tensor([1.0]), None, -8, 7, 1.0),
    ],
    "fake_quantize_lsq_backward": [
        (floats(), floats(), torch.tensor([0.5]), None, None, -8, 7, 0.1),
        (floats(), floats().to(memory_format=LAST), *PAIR, 1, 0, 15, 1.0),
    ],
    "fake_quantize_lsq_backward_": [
        (floats(), floats(), torch.tensor([0.5]), torch.tensor([1.0]), None, -8, 7, 0.1),
    ],
    "fake_quantize_pact": [
        (floats(True), parameter(3.0), 15),
        (floats().bfloat16().to(memory_format=LAST), torch.tensor([3.0]), 255),
    ],
    "fake_quantize_pact_backward": [(floats(), floats(), torch.tensor([3.0]), 15)],
    "fake_quantize_pact_backward_": [(floats(), floats(), torch.tensor([3.0]), 15)],
    "min_max": [(floats(),)],
    "min_max_per_channel": [(floats(), 1)],
    "min_max_per_group": [(floats(), 2, -1), (floats().to(memory_format=LAST), 3, 1)],
    "histogram": [(floats(), 10, -1.0, 2.0)],
    "histogram_min_max": [(floats(), 10, -1.0, 2.0)],
    "rebin_histogram": [(torch.arange(50), 0.0, 1.0, -1.0, 3.0)],
    "range_l2": [(torch.arange(50), *RANGE, 16)],
    "range_kl": [(torch.arange(50), *RANGE, 16)],
    "range_mse": [(torch.arange(50), *RANGE, 0, 15, False)],
    "range_mse_per_channel": [(floats(), 1, -7, 7, True), (floats().half(), -2, 0, 15, False)],
    "conv2d": [
        conv_args("3x3"),
        conv_args("depthwise", y_scale=None, y_zero_point=None),
        conv_args(
            "valid",
            relu=True,
            residual=random_codes((2, 8, 4, 4)),
            residual_scale=S,
            residual_zero_point=Z,
        ),
    ],
    "conv_transpose2d": [
        tuple(make_transposed_case("odd channels").values()),
        tuple(make_transposed_case("depthwise", y_scale=None, y_zero_point=None).values()),
    ],
    "softmax": [
        (codes(), S, Z, -1, S, Z, 0, 255),
        (codes(torch.int8).to(memory_format=LAST), S, Z, 1, None, None, 0, 255),
        (codes(), S, Z, 1, S, Z, -128, 127),
    ],
    "layer_norm": [
        (codes(), S, Z, (5,), torch.rand(5), torch.rand(5), 1e-5, S, Z, -128, 127),
        (codes(torch.int8).to(memory_format=LAST), S, Z, (4, 5), None, None, 0.1, None, None, 0, 1),
    ],
    "linear": [(*make_linear_case((2, 3)).values(), True)],
    "linear_dynamic": [
        (floats(), random_codes((7, 5), torch.int8), torch.rand(7) + 0.1, torch.rand(7), "gelu"),
        (floats(True).bfloat16(), random_codes((7, 5), torch.int8), S, None, "none"),
    ],
    "linear_weight_only": [
        (floats(), random_codes((7, 3)), torch.rand(7, 1), None, torch.rand(7), 4, 8, None),
        (floats(), random_codes((7, 2)), torch.rand(7, 1), random_codes((7, 1)), None, 3, 8, None),
    ],
    "linear_weight_only_exact": [
        (floats(), random_codes((7, 3)), torch.rand(7, 1), None, torch.rand(7), 4, 8, None),
        (floats(), random_codes((7, 2)), torch.rand(7, 2), None, None, 3, 3, torch.rand(8)),
    ],
    "matmul": [
        (codes(), S, Z, codes(torch.int8).mT, S, Z, S, Z, -128, 127),
        (codes(), S, Z, codes()[0, 0].mT, S, Z, None, None, 0, 255),
    ],
    "add": [
        (codes(), S, Z, codes(torch.int8), S, Z, S, Z, 0, 255, False),
        (codes().to(memory_format=LAST), S, Z, codes()[:1], S, Z, S, Z, 0, 255, True),
    ],
    "mul": [
        (codes(), S, Z, codes(torch.int8), S, Z, S, Z, 0, 255, False),
        (codes().to(memory_format=LAST), S, Z, codes()[:, :, :1, :1], S, Z, S, Z, 0, 255, True),
    ],
    "requantize": [(codes(), S, Z, S, Z, -128, 127, True)],
    "lookup": [
        (codes(), random_codes((256,), torch.int8)),
        (codes(torch.int8).to(memory_format=LAST), random_codes((256,))),
    ],
    "batch_norm": [(codes(), S, Z, torch.ones(3), torch.ones(3), S, Z, 0, 255, False)],
    "batch_norm_act": [
        batch_norm_args(floats(True), floats()),
        batch_norm_args(floats(True).to(memory_format=LAST)),
        batch_norm_args(floats(True), training=False),
        (floats(), *[None] * 5, True, 0.1, 1e-5, True, *[None] * 5, 0.0, False, 0, 255),
    ],
    "batch_norm_act_backward": [
        batch_norm_backward_args(floats(), [True] * 4),
        batch_norm_backward_args(floats().to(memory_format=LAST), [True, False, True, False]),
    ],
    "max_pool2d": [(codes(), (2, 2), (2, 1), (1, 0), (1, 1), True)],
    "avg_pool2d": [(codes(), S, Z, (2, 2), (), (1, 0), True, False, None, S, Z, -128, 127)],
    "max_pool2d_train": [
        (torch.randn(2, 5, 7, 6, requires_grad=True), [3, 2], [2, 2], [1, 1], [1, 1], True),
    ],
    "max_pool2d_train_backward": [
        (
            torch.randn(1, 3, 2, 2),
            torch.zeros(1, 3, 2, 2, dtype=torch.uint8),
            [2, 2],
            [2, 2],
            [0, 0],
            [1, 1],
            5,
            4,
        ),
    ],
    "conv2d_train": [
        (
            torch.randn(1, 2, 5, 5, requires_grad=True),
            torch.randn(4, 2, 3, 3, requires_grad=True),
            torch.randn(4, requires_grad=True),
            [1, 1],
            [1, 1],
            [1, 1],
            1,
            S,
            Z,
            0,
            255,
            None,
            127,
        ),
    ],
    "adaptive_avg_pool2d": [(codes(), S, Z, (2, 3), S, Z, 0, 255)],
    "pad": [
        (codes(), S, Z, (1, 2, 0, 1), "reflect"),
        (codes(torch.int8).to(memory_format=LAST), S, Z, (1, 0, 0, 0, 2, 1), "constant"),
    ],
    "upsample_nearest2d": [
        (codes(), (7, 6), None, False),
        (codes(torch.int8).to(memory_format=LAST), None, (2.0, 1.5), True),
    ],
    "upsample_bilinear2d": [
        (codes(), S, Z, (7, 6), None, False, S, Z, -128, 127),
        (codes().to(memory_format=LAST), S, Z, None, (2.0, 1.5), True, S, Z, 0, 255),
    ],
    "channel_shuffle": [(codes(), 3), (codes(torch.int8).to(memory_format=LAST), 1)],
    "pixel_shuffle": [(random_codes((2, 8, 3, 5)), 2)],
    "pixel_unshuffle": [(random_codes((2, 3, 4, 6)), 2)],
    "mean": [
        (codes(), S, Z, (1, -1), True, S, Z, 0, 255),
        (codes().to(memory_format=LAST), S, Z, (2, 3), True, S, Z, -128, 127),
        (codes().to(memory_format=LAST), S, Z, (2,), False, S, Z, 0, 255),
    ],
    "sum": [(codes(torch.int8), S, Z, (0,), False, S, Z, 0, 255)],
    "cat": [
        ([codes(torch.int8)] * 3, *([p] for p in channel_qparams()), 1, S, Z, -128, 127),
        ([codes(), codes()], [S, S], [Z, Z], 1, S, Z, 0, 255),
        ([codes().to(memory_format=LAST), codes()], [S, S], [Z, Z], -3, S, Z, 0, 255),
    ],
}
CASES = [
    pytest.param(name, sample, id=f"{name}-{i}")
    for name, samples in SAMPLES.items()
    for i, sample in enumerate(samples)
]


def test_every_operator_has_a_sample_and_a_wrapper():
    registered = {
        schema.name.removeprefix("qtoolkit::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("qtoolkit::")
    }
    # run_plan takes an object that opcheck cannot make; tests/python/test_compile.py is about it.
    assert registered - {"run_plan"} == set(SAMPLES)
    internal = {name for name in registered if not hasattr(ops, name)}
    suffixes = ("_backward", "_backward_", "_mask", "_exact")
    assert {name for name in internal if not name.endswith(suffixes)} == set()


@pytest.mark.parametrize(("name", "sample"), CASES)
def test_opcheck(name, sample):
    torch.library.opcheck(getattr(torch.ops.qtoolkit, name).default, sample)


@pytest.mark.parametrize(("name", "sample"), CASES)
def test_meta_tells_shape_dtype_and_strides(name, sample):
    def to_meta(value):
        if isinstance(value, list):
            return [to_meta(item) for item in value]
        return value.detach().to("meta") if isinstance(value, Tensor) else value

    operator = getattr(torch.ops.qtoolkit, name)
    real, meta = operator(*sample), operator(*map(to_meta, sample))
    for a, b in zip(*((r,) if isinstance(r, Tensor) else r or () for r in (real, meta))):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert b.is_meta


class Network(nn.Module):
    """Some of everything, with plain tensors as buffers."""

    def __init__(self) -> None:
        super().__init__()
        conv, depthwise = make_case("stem"), make_case("depthwise")
        self.register_buffer("weight", conv["weight"])
        self.register_buffer("weight_scale", conv["weight_scale"])
        self.register_buffer("bias", conv["bias"])
        self.register_buffer("depthwise", depthwise["weight"][:1].repeat(64, 1, 1, 1))
        self.register_buffer("depthwise_scale", torch.full((64,), 0.01))
        self.register_buffer("scale", scale(0.05))
        self.register_buffer("zero_point", zero_point(120))
        self.register_buffer("linear", make_linear_case(k=64)["weight"])
        self.register_buffer("linear_scale", make_linear_case(k=64)["weight_scale"])

    def forward(self, x: Tensor) -> Tensor:
        s, z = self.scale, self.zero_point
        x = ops.fake_quantize_per_tensor(x, 0.01, 3, 0, 255)
        x = ops.quantize_per_tensor(x, s, z, 0, 255)
        x = ops.conv2d(
            x,
            s,
            z,
            self.weight,
            self.weight_scale,
            self.bias,
            [2, 2],
            [3, 3],
            [1, 1],
            1,
            s,
            z,
            0,
            255,
            True,
        )
        x = ops.max_pool2d(x, [3, 3], [2, 2], [1, 1], [1, 1], False)
        y = ops.conv2d(
            x,
            s,
            z,
            self.depthwise,
            self.depthwise_scale,
            None,
            [1, 1],
            [1, 1],
            [1, 1],
            64,
            s,
            z,
            0,
            255,
            False,
            x,
            s,
            z,
        )
        x = ops.add(x, s, z, y, s, z, s, z, 0, 255, True)
        x = ops.cat([x[:, :32], y[:, 32:]], [s, s], [z, z], 1, s, z, 0, 255)
        x = ops.adaptive_avg_pool2d(x, s, z, [1, 1], s, z, 0, 255).flatten(1)
        return ops.linear(x, s, z, self.linear, self.linear_scale, None, None, None, 0, 255)


def image(batch: int = 2) -> Tensor:
    return torch.linspace(-3, 3, batch * 3 * 32 * 32).view(batch, 3, 32, 32)


@pytest.mark.parametrize("freeze", [False, True])
def test_script_saves_and_loads(freeze):
    network = Network().eval()
    expected = network(image())
    scripted = torch.jit.script(network)
    if freeze:
        scripted = torch.jit.freeze(scripted)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for _ in range(3):  # the executor profiles, then optimises
        assert torch.equal(scripted(image()), expected)
        assert torch.equal(loaded(image()), expected)
    with torch.inference_mode():
        assert torch.equal(loaded(image()), expected)


def test_a_saved_script_runs_with_the_library_alone(tmp_path):
    torch.jit.save(torch.jit.script(Network().eval()), tmp_path / "network.pt")
    torch.save((image(), Network()(image())), tmp_path / "data.pt")
    library = _library._FOLDER / "libqtoolkit_ops.so"
    program = f"""
import torch
torch.ops.load_library({str(library)!r})
x, expected = torch.load({str(tmp_path / "data.pt")!r})
assert torch.equal(torch.jit.load({str(tmp_path / "network.pt")!r})(x), expected)
import sys
assert "qtoolkit" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_export_with_a_dynamic_batch():
    network = Network().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(network, (image(2),), dynamic_shapes={"x": {0: batch}})
    for size in (2, 5):
        assert torch.equal(program.module()(image(size)), network(image(size)))


def test_compile_of_inference():
    network = Network().eval()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(image()), network(image()))


def test_work_is_shared_among_threads():
    """A process starts with one thread; the first large operator makes the team."""
    program = """
import os, numpy, torch
from qtoolkit import ops
torch.set_num_threads(2)
count = lambda: len(os.listdir("/proc/self/task"))
x = torch.from_numpy(numpy.zeros(1 << 20, numpy.float32))
before = count()
ops.quantize_per_tensor(x, torch.tensor(0.1), torch.tensor(0, dtype=torch.int32), -128, 127)
assert count() == before + 1, (before, count())
libraries = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.split("/")[-1]}
assert len(libraries) == 1, libraries
"""
    subprocess.run([sys.executable, "-c", program], check=True)

"""quantize_weights on models as users write them."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from networks import sqnr
from torch import Tensor, nn
from weight_only_models import decoder, tokens

import qtoolkit as qt
from qtoolkit.nn import QuantizedWeightConv2d, QuantizedWeightEmbedding, QuantizedWeightLinear
from qtoolkit.nn.weight_only import QuantizedWeight

FORMATS = ["int8", "int6", "int5", "int4", "int3", "int2", "ternary", "binary"]
FORMATS += ["nf4", "fp8", "mxfp4", "nvfp4"]
# Lowest signal to noise of normally distributed weights, dB.
LEAST = dict(zip(FORMATS, (43, 31, 25, 20, 14, 8, 6.5, 3.5, 20, 31, 18, 20)))


def quantize(model: nn.Module, *args: object, **options: object) -> nn.Module:
    return qt.quantize_weights(model, *args, progress=False, **options)


def snapshot(model: nn.Module) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_on_every_kind_of_layer(format):
    torch.manual_seed(0)
    kinds = [nn.Linear(256, 24), nn.Conv2d(16, 24, 3, padding=1, groups=2), nn.Embedding(24, 256)]
    inputs = [torch.randn(5, 256), torch.randn(2, 16, 7, 7), torch.tensor([[3, 0, 23]])]
    classes = [QuantizedWeightLinear, QuantizedWeightConv2d, QuantizedWeightEmbedding]
    for layer, x, cls in zip(kinds, inputs, classes):
        nn.init.normal_(layer.weight)
        new = quantize(layer, format, 64, types=[type(layer)])
        assert type(new) is cls
        assert new.weight.shape == layer.weight.shape
        assert sqnr(layer.weight, new.weight) > LEAST[format]
        reference = copy.deepcopy(layer)
        reference.weight.data = new.weight
        torch.testing.assert_close(new(x), reference(x))


def test_the_model_is_not_changed_and_float_parameters_are_shared():
    model = decoder().train()
    before = snapshot(model)
    new = quantize(model, "int4", 16)
    assert same(snapshot(model), before)
    assert model.training
    assert not new.training
    assert all(type(block.q) is nn.Linear for block in model.blocks)
    assert new.blocks[0].norm1.weight is model.blocks[0].norm1.weight
    assert new.embedding.weight is model.embedding.weight
    assert isinstance(new.blocks[1].down, QuantizedWeightLinear)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_methods_with_data_change_no_float_model_and_are_better_than_rounding(method):
    model = decoder(width=64)
    data = tokens()
    before = snapshot(model)
    y = model(data[0])
    rounded = quantize(model, "int3", 32)
    new = quantize(model, "int3", 32, method, data)
    assert same(snapshot(model), before)
    assert model.state_dict().keys() >= {"norm.weight"}
    assert sqnr(y, new(data[0])) > sqnr(y, rounded(data[0])) + 0.5


def test_awq_folds_factors_into_norms_and_keeps_the_others():
    model = decoder()
    new = quantize(model, "int3", 16, "awq", tokens())
    assert new.blocks[0].q.input_factor is None
    assert not torch.equal(new.blocks[0].norm1.weight, model.blocks[0].norm1.weight)
    assert new.blocks[0].down.input_factor is not None


def test_awq_gives_the_layer_of_the_output_no_factor():
    model = decoder()
    with torch.no_grad():
        model.norm.weight[3] = 20.0  # a column that factors would serve
    alone = qt.quantize_weights(model, "int3", 16, "awq", tokens(), include="head", progress=False)
    inside = qt.quantize_weights(
        nn.Sequential(model, nn.Softmax(-1)), "int3", 16, "awq", tokens(), include="0.head",
        progress=False,
    )  # fmt: skip
    assert alone.head.input_factor is None
    assert torch.equal(alone.norm.weight, model.norm.weight)
    assert inside[0].head.input_factor is not None or not torch.equal(
        inside[0].norm.weight, model.norm.weight
    )


def test_awq_folds_no_factor_where_something_else_reads_the_norm():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(32)
            self.layer = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return x + self.layer(x)

    torch.manual_seed(0)
    model = Residual()
    x = torch.randn(64, 32) * torch.logspace(-1, 1, 32)
    new = quantize(model, "int2", 16, "awq", [x])
    assert new.layer.input_factor is not None
    assert new.norm.weight is model.norm.weight


def test_tied_weights_stay_tied_or_stay_float():
    model = decoder(tied=True)
    x = tokens(1)[0]
    new = quantize(model, "int4", 16)
    assert new.head.weight is new.embedding.weight is model.embedding.weight
    reason = {layer.name: layer.reason for layer in qt.explain(new).float_layers}["head"]
    assert "embedding shares its weight" in reason
    both = quantize(model, "int8", 16, types=[nn.Linear, nn.Embedding])
    assert both.head.codes is both.embedding.codes
    assert sqnr(model(x), both(x)) > 30
    gptq = quantize(model, "int8", 16, "gptq", [x], types=[nn.Linear, nn.Embedding])
    assert gptq.head.codes is gptq.embedding.codes
    assert "shared" in gptq.head.method


def test_include_exclude_and_explain():
    model = decoder()
    new = quantize(model, "nf4", 16, include="blocks.*", exclude="blocks.0.down")
    named = dict(new.named_modules())
    chosen = {name for name, m in named.items() if isinstance(m, QuantizedWeight)}
    assert "blocks.1.down" in chosen
    assert "blocks.0.down" not in chosen
    explained = {layer.name: layer for layer in qt.explain(new).layers}
    assert explained["blocks.0.q"].format == "float x nf4 per 16 (rtn) -> float"
    assert explained["blocks.0.down"].reason == "it is excluded"
    assert explained["head"].reason == "it is not included"
    mixed = quantize(new, "int8", 16, include="head")
    assert (mixed.head.format, mixed.blocks[0].q.format) == ("int8", "nf4")


def test_layers_that_compute_something_else_stay_float():
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    attention = nn.MultiheadAttention(16, 2)
    model = nn.ModuleDict({
        "own": Own(8, 8), "attention": attention, "plain": nn.Linear(8, 8),
        "lora_A": nn.Linear(8, 2), "normed": nn.Embedding(4, 8, max_norm=1.0),
    })  # fmt: skip
    new = quantize(model, types=[nn.Linear, nn.Embedding])
    reasons = {layer.name: layer.reason for layer in qt.explain(new).float_layers}
    assert set(reasons) == {"own", "attention.out_proj", "lora_A", "normed"}
    assert "overrides forward" in reasons["own"]
    assert isinstance(new["plain"], QuantizedWeightLinear)


def test_convolutions_with_data_and_every_padding():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding="same", padding_mode="reflect", dilation=2),
        nn.ReLU(),
        nn.Conv2d(16, 8, (3, 1), padding=(1, 2), padding_mode="circular", groups=4),
    )
    x = torch.randn(8, 3, 16, 16)
    y = model(x)
    scores = {}
    for method in ("rtn", "gptq", "awq"):
        new = quantize(model, "int4", 16, method, [(x, torch.zeros(8))])
        scores[method] = float(sqnr(y, new(x)))
        assert new(x).shape == y.shape
    assert scores["gptq"] > scores["rtn"] + 1
    assert scores["awq"] >= scores["rtn"]
    assert new[4].method == "rtn (groups)"


def test_copies_pickles_state_dicts_and_files(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(16, 24), nn.Linear(24, 24), nn.LayerNorm(24))
    new = quantize(model, "int3", 10, types=[nn.Linear, nn.Embedding])
    x = torch.tensor([[1, 2, 15]])
    y = new(x)
    for again in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert torch.equal(again(x), y)
    other = quantize(nn.Sequential(nn.Embedding(16, 24), nn.Linear(24, 24), nn.LayerNorm(24)),
                     "int3", 10, types=[nn.Linear, nn.Embedding])  # fmt: skip
    other.load_state_dict(new.state_dict())
    assert torch.equal(other(x), y)
    qt.save(new, tmp_path / "m.qt")
    loaded = qt.load(tmp_path / "m.qt")
    assert torch.equal(loaded(x), y)
    assert str(qt.explain(loaded)) == str(qt.explain(new))


def test_16_bit_models_and_moves():
    model = decoder().bfloat16()
    x = tokens(1)[0]
    new = quantize(model, "int8", 16, types=[nn.Linear, nn.Embedding])
    assert new(x).dtype == torch.bfloat16
    assert new.blocks[0].q.scale.dtype == torch.float32
    assert sqnr(model(x).float(), new(x).float()) > 25
    half = copy.deepcopy(new).half()
    assert half(x).dtype == torch.float16
    assert half.embedding.weight.dtype == torch.float16


def test_compiled_and_with_gradients_of_inputs():
    model = quantize(decoder(), "int4", 16)
    x = tokens(1)[0]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    adapter = nn.Parameter(torch.zeros(32))
    model.blocks[0].register_forward_pre_hook(lambda _, args: (args[0] + adapter,))
    model(x).sum().backward()
    assert adapter.grad.abs().sum() > 0


@pytest.mark.parametrize("format", ["fp16", "bf16"])
def test_casting_keeps_norms_in_float32(format):
    model = decoder()
    x = tokens(1)[0]
    new = quantize(model, format)
    dtype = torch.float16 if format == "fp16" else torch.bfloat16
    assert new.blocks[0].q.weight.dtype == new(x).dtype == dtype
    assert new.norm.weight is model.norm.weight
    assert model.blocks[0].q.weight.dtype == torch.float32
    assert sqnr(model(x), new(x).float()) > 35
    assert {layer.reason for layer in qt.explain(new).float_layers} == {
        "norms are computed in float32"
    }
    with torch.no_grad():
        model.head.weight[0, 0] = 1e30
    if format == "fp16":
        with pytest.raises(ValueError, match=r"head.weight has values .* such as 1e\+30"):
            quantize(model, format)


def test_casting_does_not_touch_a_model_of_16_bits():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)).half()
    new = quantize(model, "bf16")
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert (new[0].weight.dtype, new[1].weight.dtype) == (torch.bfloat16, torch.float32)


def test_casting_leaves_out_tensors_of_modules_that_have_children():
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    new = quantize(model, "bf16", exclude="1")
    assert {p.dtype for p in new[1].parameters()} == {torch.float32}
    assert new[0].weight.dtype == torch.bfloat16


def test_casts_and_codes_in_one_model():
    model, x = decoder(), tokens(1)[0]
    codes_first = quantize(quantize(model, "int4", 16, include="*.q"), "bf16")
    cast_first = quantize(quantize(model, "bf16"), "int4", 16, include="*.q")
    for both in (codes_first, cast_first):
        assert both.blocks[0].q.bits == 4
        y = both(x)
        assert y.dtype == torch.bfloat16
        assert sqnr(model(x), y.float()) > 15


def test_resume_follows_what_the_inputs_of_a_layer_depend_on(tmp_path):
    def make(scale: float) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4)).eval()
        with torch.no_grad():
            model[1].weight[::2] = scale
        return model

    data = [torch.randn(64, 16, generator=torch.Generator().manual_seed(1))]
    quantize(make(1.0), "int3", 16, "gptq", data, resume=tmp_path)
    again = quantize(make(30.0), "int3", 16, "gptq", data, resume=tmp_path)
    fresh = quantize(make(30.0), "int3", 16, "gptq", data)
    assert torch.equal(again[2].codes, fresh[2].codes)


def test_int8_activations_are_near_exact_ones():
    model, x = decoder(), tokens(1)[0]
    exact, fast = (quantize(model, "int4", 16, accumulate=a) for a in ("float32", "int8"))
    assert sqnr(exact(x), fast(x)) > 30


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        return self.used(self.used(x)) if twice else self.used(x)


def test_a_layer_that_data_never_reaches_is_rounded_and_named():
    with pytest.warns(UserWarning, match="never reaches unused"):
        new = quantize(Branches(), "int4", 8, "gptq", [torch.randn(16, 8)])
    assert (new.used.method, new.unused.method) == ("gptq", "rtn (never reached)")
    assert "never reached" in str(qt.explain(new))
    quantize(Branches(), "int4", 8, "gptq", [{"x": torch.randn(16, 8), "twice": True}] * 2,
             exclude="unused")  # fmt: skip


def test_a_layer_that_a_later_batch_reaches_first():
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.sum() > 0 else self.b(x)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = quantize(Either(), "int4", 8, "gptq", [torch.ones(16, 8), -torch.ones(16, 8)])
    assert (new.a.method, new.b.method) == ("gptq", "gptq")


def test_strange_weights():
    torch.manual_seed(0)
    layer = nn.Linear(40, 6)  # groups of 16, 16 and 8
    with torch.no_grad():
        layer.weight[0] = 0
        layer.weight[1, :16] = 0
        layer.weight[2, 3] = 1e30
        layer.weight[3] = 1e-42
    for format in FORMATS:
        size = None if format in ("mxfp4", "nvfp4") else 16
        for method in ("rtn", "hqq", "gptq", "awq"):
            new = quantize(layer, format, size, method, [torch.randn(8, 40)])
            weight = new.weight
            assert torch.isfinite(weight).all(), (format, method)
            if format not in ("binary", "ternary", "int2"):
                assert abs(float(weight[2, 3]) / 1e30 - 1) < 0.2, (format, method)
            if format not in ("binary", "nvfp4"):
                assert not weight[0].any(), (format, method)
            if format not in ("nvfp4", "binary", "int2"):
                assert sqnr(layer.weight[4:], weight[4:]) > 2, (format, method)


def test_inputs_without_variance():
    """Dead inputs, the same row again and again, fewer rows than columns."""
    torch.manual_seed(0)
    layer = nn.Linear(32, 8)
    x = torch.randn(1, 32).repeat(4, 1)
    x[:, :5] = 0
    for data in (x, torch.zeros(4, 32)):
        for method in ("gptq", "awq"):
            new = quantize(layer, "int4", 16, method, [data])
            assert torch.isfinite(new.weight).all()
            assert sqnr(layer.weight, new.weight) > 5
            assert float((new(data) - layer(data)).detach().abs().max()) < 0.2


def test_interrupted_runs_go_on(tmp_path, monkeypatch):
    model, data = decoder(), tokens()
    whole = quantize(model, "int4", 16, "awq", data)
    real = qt.weight_only.Awq.quantize
    calls = []

    def counted(self: object, weights: list, *args: object) -> list:
        calls.append(len(weights))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, weights, *args)

    monkeypatch.setattr(qt.weight_only.Awq, "quantize", counted)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, "int4", 16, "awq", data, resume=tmp_path / "run")
    resumed = quantize(model, "int4", 16, "awq", data, resume=tmp_path / "run")
    assert len(calls) == 4 + 9 - 3
    assert same(snapshot(resumed), snapshot(whole))
    broken = next((tmp_path / "run").iterdir())
    broken.write_bytes(broken.read_bytes()[:-5])
    again = quantize(model, "int4", 16, "awq", data, resume=tmp_path / "run")
    assert same(snapshot(again), snapshot(whole))
    assert len(calls) == 11
    quantize(model, "int3", 16, "awq", data[:1], resume=tmp_path / "run")
    assert len(calls) == 20


def bad_weight() -> nn.Module:
    model = decoder()
    with torch.no_grad():
        model.blocks[1].up.weight[3, 4] = torch.nan
    return model


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, "needs a torch.nn.Module, got int"),
        ({"model": bad_weight()}, ValueError, r"blocks.1.up.weight holds 1 values that are NaN"),
        ({"format": "int7"}, ValueError, "weights have no format 'int7': use int8"),
        ({"format": "uint8"}, ValueError, "weights have no format 'uint8'"),
        ({"format": "nf4", "symmetric": False}, ValueError, "nf4 has no zero points"),
        ({"group_size": 0}, ValueError, "group_size must be at least 1"),
        ({"group_size": "128"}, TypeError, "group_size must be an integer or None, got '128'"),
        ({"group_size": 64.0}, TypeError, "group_size must be an integer"),
        (
            {"method": "gptq", "data": tokens(), "options": {"damping": "x"}},
            TypeError,
            "method 'gptq': an option is of a wrong type",
        ),
        (
            {"method": "gptq", "data": [torch.zeros(0, 24, dtype=torch.long)]},
            ValueError,
            "gives blocks.0.q no rows; are all batches empty",
        ),
        ({"resume": __file__}, NotADirectoryError, "is a file, not a folder"),
        (
            {"model": qt.quantize_weights(nn.Linear(8, 8), "int8", progress=False)},
            ValueError,
            "its 1 are quantized already",
        ),
        ({"method": "best"}, ValueError, "unknown method 'best': use one of awq, gptq, hqq, rtn"),
        ({"method": "gptq"}, ValueError, "gptq needs data"),
        ({"options": {"x": 1}}, ValueError, r"method 'rtn' has no option \['x'\]"),
        ({"include": "nothing"}, ValueError, "include pattern 'nothing' matches none of the 15"),
        ({"exclude": "*"}, ValueError, "no layer can be quantized"),
        ({"types": [nn.ReLU]}, ValueError, "types must be of nn.Linear"),
        ({"accumulate": "int4"}, ValueError, "accumulate must be"),
        ({"method": "gptq", "data": []}, ValueError, "data has no batch"),
        ({"method": "gptq", "data": torch.zeros(3)}, TypeError, "data must be an iterable"),
        ({"method": "gptq", "data": [3]}, TypeError, "a batch of data must be a tensor"),
        (
            {"method": "gptq", "data": [torch.zeros(2, 3)]},
            ValueError,
            r"the model fails on batch 0 of data, of shapes \[\[2, 3\]\]",
        ),
        ({"method": "gptq", "data": tokens(), "checkpoint": "x"}, ValueError, "a checkpoint"),
        ({"model": qt.quantize_dynamic(nn.Linear(8, 8))}, ValueError, "converted already"),
        ({"model": decoder().to("meta")}, ValueError, "on the meta device: give the checkpoint"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        quantize(**{"model": decoder(), **arguments})


def test_inputs_that_are_not_finite_are_named():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.randn(4, 8)
    x[2, 2] = torch.inf
    with pytest.raises(ValueError, match="the input of 0 holds NaN or Inf"):
        quantize(model, "int4", 8, "gptq", [x])
    with pytest.raises(ValueError, match="the input of 0 is too large: its squares are no float32"):
        quantize(model, "int4", 8, "awq", [torch.full((4, 8), 1e30)])


def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(decoder(), "int4", 16, "gptq", tokens())

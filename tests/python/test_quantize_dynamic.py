"""quantize_dynamic on networks as users write them, and nn.DynamicLinear."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from networks import sqnr
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

import qtoolkit as qt
from qtoolkit.nn import DynamicLinear


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, n, width))


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = Attention(width, 4)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """A small transformer whose head shares the embedding's weight."""

    def __init__(self, words: int = 50, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.layers = nn.Sequential(*[Layer(width) for _ in range(2)])
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(tokens)))


def encoder() -> tuple[Encoder, Tensor]:
    torch.manual_seed(0)
    return Encoder().eval(), torch.randint(0, 50, (3, 11), generator=torch.Generator())


def mlp(*between: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), *between, nn.Linear(40, 10)).eval()


def dynamic_layers(model: nn.Module) -> dict[str, DynamicLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, DynamicLinear)}


# --- networks -------------------------------------------------------------------------------------


def test_a_transformer_keeps_its_accuracy_in_a_quarter_of_the_memory():
    model, tokens = encoder()
    before = copy.deepcopy(model.state_dict())
    quantized = qt.quantize_dynamic(model)
    assert len(dynamic_layers(quantized)) == 9
    assert sqnr(model(tokens), quantized(tokens)) > 35
    assert qt.model_size(quantized.layers) < 0.3 * qt.model_size(model.layers)
    assert not dynamic_layers(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_each_layer_is_the_operator():
    model = mlp(nn.Tanh())
    quantized = qt.quantize_dynamic(model)
    x = randn(7, 24)
    y = torch.tanh(qt.ops.linear_dynamic(x, *quantized[0].buffers()))
    assert torch.equal(quantized(x), qt.ops.linear_dynamic(y, *quantized[2].buffers()))
    scale = model[0].weight.abs().amax(1) / 127
    assert torch.equal(quantized[0].weight_scale, scale.detach())
    assert quantized[0].weight.dtype == torch.int8
    assert torch.equal(quantized[0].bias, model[0].bias.detach())


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (nn.ReLU(), "relu"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (nn.SiLU(inplace=True), "silu"),
    ],
    ids=str,
)
def test_an_activation_in_a_sequential_is_fused(activation, name):
    model = mlp(activation)
    x = randn(7, 24)
    quantized = qt.quantize_dynamic(model)
    assert quantized[0].activation == name
    assert type(quantized[1]) is nn.Identity
    plain = qt.quantize_dynamic(model, fuse=False)
    assert type(plain[1]) is type(activation)
    assert plain[0].activation == "none"
    assert sqnr(plain(x), quantized(x)) > 60
    assert sqnr(model(x), quantized(x)) > 35


def test_an_activation_is_not_fused_where_the_layer_is_called_elsewhere():
    shared = nn.Linear(24, 24)
    model = nn.ModuleList([nn.Sequential(shared, nn.ReLU()), shared])
    quantized = qt.quantize_dynamic(model)
    assert quantized[0][0] is quantized[1]
    assert isinstance(quantized[0][1], nn.ReLU)

    class Own(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[0](x)

    quantized = qt.quantize_dynamic(Own(nn.Linear(24, 24), nn.ReLU()))
    assert isinstance(quantized[1], nn.ReLU)
    hooked = mlp(nn.ReLU())
    hooked[1].register_forward_hook(lambda module, args, output: output + 1)
    assert isinstance(qt.quantize_dynamic(hooked)[1], nn.ReLU)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
def test_pytorchs_encoder_leaves_its_fused_float_function(grad, padding):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu")
    model = nn.TransformerEncoder(layer, 2).eval()
    quantized = qt.quantize_dynamic(model)
    assert sorted(dynamic_layers(quantized)) == [
        f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)
    ]
    x = randn(3, 9, 32)
    mask = torch.zeros(3, 9, dtype=torch.bool)
    if padding:
        mask[1, 5:] = True
    with torch.set_grad_enabled(grad):
        expected = model(x, src_key_padding_mask=mask if padding else None)
        actual = quantized(x, src_key_padding_mask=mask if padding else None)
    assert sqnr(expected[~mask], actual[~mask]) > 30


def test_a_shared_layer_and_a_shared_weight_stay_shared():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
            self.b.weight = self.a.weight
            self.again = self.a

    quantized = qt.quantize_dynamic(Tied())
    assert quantized.again is quantized.a
    assert quantized.b.weight.data_ptr() == quantized.a.weight.data_ptr()
    assert not torch.equal(quantized.a.bias, quantized.b.bias)
    assert qt.model_size(quantized) < 16 * 16 + 4 * 16 * 4


def test_sixteen_bit_models():
    model, x = mlp(nn.ReLU()), randn(5, 24)
    quantized = qt.quantize_dynamic(copy.deepcopy(model).bfloat16())
    y = quantized(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert sqnr(model(x), y.float()) > 30
    # A float32 one after .half() keeps its scales and takes half inputs.
    half = qt.quantize_dynamic(model).half()
    assert half[0].weight_scale.dtype == half[0].bias.dtype == torch.float32
    assert half(x.half()).dtype == torch.float16


# --- what is chosen -------------------------------------------------------------------------------


def test_names_choose():
    model, _ = encoder()
    only = qt.quantize_dynamic(model, include=["layers.0.mlp", "head"])
    assert sorted(dynamic_layers(only)) == ["head", "layers.0.mlp.0", "layers.0.mlp.2"]
    without = qt.quantize_dynamic(model, include="layers", exclude="*.attention.*")
    assert len(dynamic_layers(without)) == 4
    reasons = {layer.name: layer.reason for layer in qt.explain(without).float_layers}
    assert reasons["head"] == "it is not included"
    assert reasons["layers.1.attention.qkv"] == "it is excluded"


def test_types_choose():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(Special(8, 8), nn.Linear(8, 8))
    assert list(dynamic_layers(qt.quantize_dynamic(model, types={Special}))) == ["0"]


def test_explain_names_layers_kernels_and_reasons():
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = nn.ModuleDict(
        {
            "good": nn.Linear(8, 8),
            "own": Own(8, 8),
            "hooked": nn.Linear(8, 8),
            "parametrized": nn.Linear(8, 8),
            "attention": nn.MultiheadAttention(8, 2),
            "long": nn.Linear(70_000, 1),
            "lazy": nn.LazyLinear(3),
        }
    )
    model["hooked"].register_forward_pre_hook(lambda module, args: None)
    parametrize.register_parametrization(model["parametrized"], "weight", Twice())
    explanation = qt.explain(qt.quantize_dynamic(model, inplace=True))
    assert explanation.layers[0].name == "good"
    assert explanation.layers[0].kind == "DynamicLinear"
    assert explanation.layers[0].format == "float x int8 -> float"
    assert explanation.layers[0].kernel.startswith("conv2d (")
    reasons = {layer.name: layer.reason for layer in explanation.float_layers}
    assert "overrides forward" in reasons.pop("own")
    assert "hooks" in reasons.pop("hooked")
    assert "parametrized" in reasons.pop("parametrized")
    assert "reads its weight itself" in reasons.pop("attention.out_proj")
    assert "overflow int32" in reasons.pop("long")
    assert "no shape yet" in reasons.pop("lazy")
    assert reasons == {}


def test_in_place_changes_the_model():
    model, tokens = encoder()
    expected = qt.quantize_dynamic(model)(tokens)
    result = qt.quantize_dynamic(model, inplace=True)
    assert result is model
    assert len(dynamic_layers(model)) == 9
    assert torch.equal(model(tokens), expected)


def test_a_lone_layer():
    linear = nn.Linear(8, 4)
    assert isinstance(qt.quantize_dynamic(linear), DynamicLinear)
    with pytest.raises(ValueError, match="lone layer in place"):
        qt.quantize_dynamic(linear, inplace=True)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (lambda: 3, {}, TypeError, r"needs a torch.nn.Module, got int"),
        (lambda: torch.jit.script(mlp()), {}, TypeError, "Python module"),
        (lambda: qt.quantize_dynamic(mlp()), {}, ValueError, "converted already"),
        (lambda: nn.Conv2d(3, 3, 1), {}, ValueError, "no linear layer can be quantized"),
        (mlp, {"exclude": "*"}, ValueError, "0: it is excluded"),
        (mlp, {"include": "fc*"}, ValueError, r"include pattern 'fc\*' matches none of the 2"),
        (mlp, {"exclude": ["0", "x"]}, ValueError, "exclude pattern 'x'"),
        (mlp, {"include": [3]}, TypeError, "include must be patterns"),
        (mlp, {"types": {nn.Conv2d}}, ValueError, "not Conv2d"),
        (mlp, {"types": nn.Linear}, TypeError, "must be a collection"),
        (mlp, {"types": ["Linear"]}, TypeError, "must hold classes"),
        (lambda: mlp().double(), {}, TypeError, "0.weight must be float32"),
    ],
)
def test_wrong_arguments(model, options, error, message):
    with pytest.raises(error, match=message):
        qt.quantize_dynamic(model(), **options)


@pytest.mark.parametrize(("part", "value"), [("weight", torch.nan), ("bias", torch.inf)])
def test_a_value_that_is_not_finite_is_named(part, value):
    model = mlp()
    with torch.no_grad():
        getattr(model[1], part).view(-1)[3] = value
    with pytest.raises(ValueError, match=rf"1\.{part} holds NaN or Inf"):
        qt.quantize_dynamic(model)
    assert not dynamic_layers(model)


def test_a_model_that_cannot_be_copied_says_so():
    model = mlp()
    model.handle = open(__file__)  # noqa: SIM115
    with pytest.raises(RuntimeError, match=r"cannot be copied .*inplace=True"):
        qt.quantize_dynamic(model)
    model.handle.close()


# --- the module -----------------------------------------------------------------------------------


def test_copies_pickles_scripts_and_state_give_the_same_bits(tmp_path):
    model, tokens = encoder()
    quantized = qt.quantize_dynamic(model)
    expected = quantized(tokens)
    for other in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert torch.equal(other(tokens), expected)
        assert len(qt.explain(other).layers) == 9
    torch.manual_seed(9)
    fresh = qt.quantize_dynamic(Encoder())
    assert not torch.equal(fresh(tokens), expected)
    fresh.load_state_dict(quantized.state_dict())
    assert torch.equal(fresh(tokens), expected)
    report = qt.export.torchscript(quantized, tmp_path / "m.pt", (tokens,))
    assert report.verified
    assert torch.equal(torch.jit.load(tmp_path / "m.pt")(tokens), expected)


def test_torch_export_and_compile_keep_the_bits():
    quantized = qt.quantize_dynamic(mlp(nn.GELU()))
    x = randn(6, 24)
    expected = quantized(x)
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(quantized, (x,), dynamic_shapes=({0: batch},))
    assert torch.equal(exported.module()(x), expected)
    assert torch.equal(torch.compile(quantized, backend="eager")(x), expected)


def test_compare_gives_the_models_noise():
    model, tokens = encoder()
    comparison = qt.compare(model, qt.quantize_dynamic(model), [tokens], progress=False)
    assert comparison.sqnr > 35


def test_the_result_is_for_inference():
    quantized = qt.quantize_dynamic(mlp().train())
    assert not quantized.training
    assert not any(p.requires_grad for p in quantized.parameters())
    assert not quantized(randn(2, 24).requires_grad_()).requires_grad


def test_from_float_says_what_is_wrong():
    with pytest.raises(TypeError, match=r"fc must be a torch\.nn\.Linear, got Conv2d"):
        DynamicLinear.from_float(nn.Conv2d(3, 3, 1), name="fc")
    with pytest.raises(ValueError, match='activation must be "none"'):
        DynamicLinear.from_float(nn.Linear(3, 3), activation="tanh")
    affine = qt.TensorSpec("uint8", "per_channel", axis=0, observer="per_channel_minmax")
    with pytest.raises(ValueError, match="fc: weights of format uint8"):
        DynamicLinear.from_float(nn.Linear(3, 3), weight=affine, name="fc")


def test_other_weights_than_int8_per_channel():
    linear, x = nn.Linear(64, 32), randn(9, 64)
    tensor = qt.TensorSpec("int8", symmetric=True, observer="minmax")
    int4 = qt.TensorSpec("int4", "per_channel", axis=0, symmetric=True,
                         observer="per_channel_minmax")  # fmt: skip
    for spec, least in ((tensor, 35), (int4, 12)):
        layer = DynamicLinear.from_float(linear, weight=spec)
        assert sqnr(linear(x), layer(x)) > least
    assert repr(layer) == "DynamicLinear(64, 32, bias=True, activation=none)"

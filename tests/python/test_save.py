"""qt.save and qt.load: the same bits, no code, nothing trusted."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from low_bit import MAPPINGS
from networks import Kinds, ResNet, batches, quantize, settle, sqnr
from torch import nn
from torch.nn import functional

import qtoolkit as qt
from qtoolkit.saving import container
from qtoolkit.saving import file as saving_file

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def mixed() -> nn.Module:
    return quantize(settle(Kinds(), (2, 3, 16, 16)), *batches((2, 3, 16, 16), 1))


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    model = settle(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten()), (2, 1, 4, 4))
    return quantize(model, *batches((2, 1, 4, 4), 1))


def saved_and_loaded(model: nn.Module, folder: Path) -> nn.Module:
    qt.save(model, folder / "m.qt")
    return qt.load(folder / "m.qt")


def test_loaded_model_has_the_bits_and_serves_every_step(mixed, tmp_path):
    x, y = batches((3, 3, 16, 16), 2, seed=5)
    loaded = saved_and_loaded(mixed, tmp_path)
    assert torch.equal(loaded(x), mixed(x))
    assert torch.equal(torch.jit.script(loaded)(x), mixed(x))
    assert torch.equal(qt.compile(loaded, x)(y), mixed(y))
    assert torch.equal(copy.deepcopy(loaded)(x), mixed(x))
    assert torch.equal(pickle.loads(pickle.dumps(loaded))(x), mixed(x))
    assert qt.explain(loaded) == qt.explain(mixed)
    assert qt.model_size(loaded) == qt.model_size(mixed)
    model = settle(Kinds(), (2, 3, 16, 16))
    assert str(qt.compare(model, loaded, [x])) == str(qt.compare(model, mixed, [x]))
    report = qt.export.torchscript(loaded, tmp_path / "m.pt", x)
    assert report.verified
    state, expected = loaded.state_dict(), mixed.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert not any(module.training for module in loaded.modules())


def test_same_model_gives_the_same_bytes_also_after_loading(mixed, tmp_path):
    loaded = saved_and_loaded(mixed, tmp_path)
    qt.save(loaded, tmp_path / "again.qt")
    assert (tmp_path / "again.qt").read_bytes() == (tmp_path / "m.qt").read_bytes()


def test_fresh_process_gives_the_same_bits(tiny, tmp_path):
    x = batches((2, 1, 4, 4), 1)[0]
    qt.save(tiny, tmp_path / "m.qt")
    torch.save((x, tiny(x)), tmp_path / "io.pt")
    code = (
        "import sys, torch, qtoolkit as qt\n"
        "x, y = torch.load(sys.argv[2])\n"
        "assert torch.equal(qt.load(sys.argv[1])(x), y)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "m.qt", tmp_path / "io.pt"], check=True)


def test_a_model_that_was_scripted_is_saved(mixed, tmp_path):
    x = batches((2, 3, 16, 16), 1)[0]
    for model in (copy.deepcopy(mixed), qt.compile(mixed, x, tune=False)):
        torch.jit.script(model)
        assert torch.equal(saved_and_loaded(model, tmp_path)(x), mixed(x))


def test_compiled_model_is_kept_with_its_plans(mixed, tmp_path):
    x = batches((2, 3, 16, 16), 1)[0]
    compiled = qt.compile(mixed, x)
    loaded = saved_and_loaded(compiled, tmp_path)
    states = [model.get_submodule("plan_0").plan.state() for model in (compiled, loaded)]
    assert (states[0][0], states[0][2]) == (states[1][0], states[1][2])
    assert states[0][2][1], "its tuning is kept"
    assert torch.equal(loaded(x), mixed(x))
    assert torch.equal(torch.jit.script(loaded)(x), mixed(x))
    assert str(loaded.plan) == str(compiled.plan)
    assert qt.explain(loaded) == qt.explain(compiled)
    with pytest.raises(ValueError, match="compiled already"):
        qt.compile(loaded, x)


class Attention(nn.Module):
    """Float parts of several kinds between quantized layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.register_buffer("shift", torch.randn(8), persistent=False)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 4, 2, batch_first=True, bidirectional=True)
        self.shared = nn.Bilinear(8, 8, 8)
        self.head = nn.ModuleDict({"a-b": nn.Linear(8, 3), "c": nn.Linear(8, 2)})

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None):
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.embed(x)], dim=1)
        x = x + self.attention(x, x, x, need_weights=False)[0] + self.shift
        x = self.lstm(x)[0].masked_fill(x > 3.0, float("-inf")).clamp(min=-1e30)
        x = self.shared(x, x) + self.shared(x, self.shift.expand_as(x))
        x = functional.normalize(x[:, 0, ...], dim=-1).to(torch.float32)
        return {"a": self.head["a-b"](x), "c": (self.head["c"](x), x.size(0))}


def test_float_parts_constants_and_structured_outputs_are_kept(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6)
    model = quantize(Attention(), x)
    loaded = saved_and_loaded(model, tmp_path)
    expected, actual = model(x), loaded(x)
    assert expected.keys() == actual.keys()
    assert torch.equal(expected["a"], actual["a"])
    assert torch.equal(expected["c"][0], actual["c"][0])
    assert expected["c"][1] == actual["c"][1] == 2
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert not any(p.requires_grad for p in loaded.parameters())


def test_layers_that_share_a_weight_still_do(tmp_path):
    layer = nn.Conv2d(2, 2, 3, padding=1)
    x = batches((1, 2, 6, 6), 1)[0]
    for model in (nn.Sequential(layer, nn.ReLU(), layer), nn.Sequential(nn.ELU(), layer, layer)):
        none = qt.QConfigMapping()
        for mapping in (None, none):
            quantized = quantize(model, x, mapping=mapping)
            loaded = saved_and_loaded(quantized, tmp_path)
            assert torch.equal(loaded(x), quantized(x))
            assert list(loaded.state_dict()) == list(quantized.state_dict())
            assert qt.model_size(loaded) == qt.model_size(quantized)


def test_dynamically_quantized_model_of_torch_modules(tmp_path):
    x = torch.randn(4, 16)
    tied = nn.Linear(16, 16)
    model = nn.Sequential(tied, nn.GELU(), nn.LayerNorm(16), nn.Sequential(tied), nn.Linear(16, 3))
    quantized = qt.quantize_dynamic(model)
    loaded = saved_and_loaded(quantized, tmp_path)
    assert torch.equal(loaded(x), quantized(x))
    assert loaded[0].weight is loaded[3][0].weight
    assert qt.explain(loaded) == qt.explain(quantized)


@pytest.mark.parametrize("norm", [None, nn.LayerNorm(8)])
@pytest.mark.parametrize("activation", ["relu", "gelu", nn.SiLU()])
def test_transformer_encoder_with_dynamic_layers(tmp_path, norm, activation):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=activation, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False)
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    quantized = qt.quantize_dynamic(model)
    loaded = saved_and_loaded(quantized, tmp_path)
    for options in ({}, {"src_key_padding_mask": mask}):
        assert torch.equal(loaded(x, **options), quantized(x, **options))
    assert list(loaded.state_dict()) == list(quantized.state_dict())
    assert qt.explain(loaded) == qt.explain(quantized)


def test_qat_model_with_a_float_batch_norm(tmp_path):
    mapping = qt.get_default_qat_qconfig_mapping().set_module_name("0", None)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    x = batches((2, 1, 8, 8), 1)[0]
    prepared = qt.prepare_qat(model, mapping, x)
    prepared(x)
    quantized = qt.convert(prepared.eval())
    loaded = saved_and_loaded(quantized, tmp_path)
    assert torch.equal(loaded(x), quantized(x))


class Uncaptured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) if x.sum() > 0 else x


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.inner = Uncaptured()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.first(x))


def rejected_models():
    x = torch.randn(2, 4)
    yield nn.Linear(4, 4), "save needs the result of qt.convert"
    yield qt.prepare(nn.Linear(4, 4), None, (x,)), "save needs the result of qt.convert"
    yield quantize(Outer(), x), r"cannot save inner \(test_save.Uncaptured\)"
    hooked = quantize(nn.Sequential(nn.Linear(4, 4)), x)
    hooked.get_submodule("0").register_forward_hook(lambda *_: None)
    yield hooked, r"cannot save 0 \(qtoolkit.nn.linear.Linear\).*forward hooks"
    hooked = quantize(nn.Sequential(nn.Linear(4, 4)), x)
    hooked.register_forward_pre_hook(lambda *_: None)
    yield hooked, "cannot save the model itself .*forward hooks"
    reads = quantize(nn.Sequential(nn.Linear(4, 4)), x)
    with reads.graph.inserting_after(next(iter(reads.graph.nodes))), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reads.graph.get_attr("0.input_format")
    yield reads, r"cannot save .* reads 0\.input_format, which is no parameter or buffer"
    dynamic = qt.quantize_dynamic(nn.Sequential(nn.Linear(4, 4), Uncaptured()))
    yield dynamic, "cannot save 1 "
    simulated = qt.prepare_qat(nn.Linear(4, 4), MAPPINGS["fp8"], (x,))
    simulated(x)
    yield qt.convert(simulated.eval()), "simulates formats"


def test_what_a_file_cannot_hold_is_named_and_nothing_is_written(tmp_path):
    for model, message in rejected_models():
        with pytest.raises(ValueError, match=message):
            qt.save(model, tmp_path / "m.qt")
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError, match="save needs"):
        qt.save("model", tmp_path / "m.qt")


def test_info_and_recipe(mixed, tmp_path):
    path = tmp_path / "m.qt"
    qt.save(mixed, path, metrics={"top1": 0.5, "cpu": "any"})
    info = qt.file_info(path)
    assert info.metrics == {"top1": 0.5, "cpu": "any"}
    assert info.version == 1
    assert info.qtoolkit == qt.__version__
    assert info.size == path.stat().st_size
    noted = qt.QConfigMapping.from_dict(info.recipe)
    assert noted == qt.get_default_qconfig_mapping("x86")
    assert [layer.name for layer in info.layers] == [r.name for r in qt.explain(mixed).layers]
    stem = next(layer for layer in info.layers if layer.name == "stem")
    scale = float(mixed.stem.output_scale)
    zero_point = int(mixed.stem.output_zero_point)
    assert stem.scales["output"] == (scale, scale)
    assert stem.ranges["output"] == (-zero_point * scale, (255 - zero_point) * scale)
    assert stem.scales["weight"][0] == float(mixed.stem.weight_scale.min())

    given = qt.get_default_qconfig_mapping("tflite")
    qt.save(qt.load(path), path, recipe=given)
    assert qt.QConfigMapping.from_dict(qt.file_info(path).recipe) == given


@pytest.mark.parametrize(
    ("metrics", "error"),
    [({"a": float("nan")}, ValueError), ({"a": object()}, TypeError), ([1], TypeError),
     ({1: 2}, TypeError)],
)  # fmt: skip
def test_metrics_are_numbers_and_texts(tiny, tmp_path, metrics, error):
    with pytest.raises(error, match="metric"):
        qt.save(tiny, tmp_path / "m.qt", metrics=metrics)


def test_failed_write_leaves_the_old_file(tiny, tmp_path):
    path = tmp_path / "m.qt"
    qt.save(tiny, path)
    old = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*m\.qt: .*too large"):
            qt.save(tiny, path, metrics={"a": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["m.qt"]
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        qt.save(tiny, tmp_path / "none" / "m.qt")


def test_file_is_a_safetensors_file(mixed, tmp_path):
    safetensors = pytest.importorskip("safetensors", reason="checks the format independently")
    qt.save(mixed, tmp_path / "m.qt")
    with safetensors.safe_open(tmp_path / "m.qt", framework="pt") as file:
        assert torch.equal(file.get_tensor("stem.weight"), mixed.stem.weight)
        assert file.metadata()["format"] == "qtoolkit"


def test_channels_last_stays(tmp_path):
    layer = nn.Conv3d(2, 2, 3).eval()
    images = nn.Conv2d(8, 8, 3, padding_mode="reflect").eval().to(memory_format=torch.channels_last)
    x = batches((1, 8, 5, 5), 1)[0]
    quantized = quantize(nn.Sequential(images, nn.Flatten()), x, mapping=qt.QConfigMapping())
    loaded = saved_and_loaded(quantized, tmp_path)
    assert layer.weight.is_contiguous()
    assert loaded.get_submodule("0").weight.stride() == quantized.get_submodule("0").weight.stride()
    assert torch.equal(loaded(x), quantized(x))


def test_version_1_file_loads():
    """The file was written when version 1 was new, and must load for ever."""
    model = qt.load(DATA / "version1.qt")
    x = torch.linspace(-2, 2, 16).reshape(1, 1, 4, 4)
    expected = json.loads((DATA / "version1.json").read_text())
    assert model(x).tolist() == expected


def test_newer_version_reads_older_files_through_migrations(tiny, tmp_path, monkeypatch):
    path = tmp_path / "m.qt"
    qt.save(tiny, path)
    monkeypatch.setattr(container, "VERSION", 2)
    with pytest.raises(qt.InvalidFileError, match="version 1 is unknown"):
        qt.load(path)

    def migrate(document):
        return {**document, "metrics": {"from": 1}}

    monkeypatch.setitem(saving_file._MIGRATIONS, 1, migrate)
    assert qt.file_info(path).metrics == {"from": 1}
    x = batches((2, 1, 4, 4), 1)[0]
    assert torch.equal(qt.load(path)(x), tiny(x))
    qt.save(tiny, path)
    monkeypatch.setattr(container, "VERSION", 1)
    with pytest.raises(qt.InvalidFileError, match="update qtoolkit"):
        qt.load(path)


def test_accuracy_does_not_change(tmp_path):
    model = settle(ResNet(), (4, 1, 8, 8))
    x = batches((4, 1, 8, 8), 1)[0]
    quantized = quantize(model, x)
    loaded = saved_and_loaded(quantized, tmp_path)
    assert sqnr(model(x), loaded(x)) == sqnr(model(x), quantized(x)) > 10


def test_checksum_is_that_of_the_documentation(tiny, tmp_path):
    path = tmp_path / "m.qt"
    qt.save(tiny, path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    meta = header.pop("__metadata__")
    digest = hashlib.sha256()
    table = json.dumps(header, sort_keys=True, separators=(",", ":"))
    for part in (b"1", meta["document"].encode(), table.encode(), data[8 + length :]):
        digest.update(len(part).to_bytes(8, "little") + part)
    assert digest.hexdigest() == meta["sha256"] == qt.file_info(path).sha256

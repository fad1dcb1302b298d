"""Bad input gets an error that says what, where and what to do, and harms nothing."""

from __future__ import annotations

import pytest
import torch
from networks import ResNet, batches, settle
from torch import nn

import qtoolkit as qt

X = torch.randn(2, 1, 8, 8)


@pytest.fixture
def model() -> nn.Module:
    return settle(ResNet(), (8, 1, 8, 8))


@pytest.fixture
def prepared(model: nn.Module) -> nn.Module:
    return qt.prepare(model, example_inputs=(X,))


def test_convert_of_an_uncalibrated_model_names_the_layer(prepared):
    with pytest.raises(RuntimeError, match=r"conv1.*qt\.calibrate"):
        qt.convert(prepared)


def test_convert_of_an_untrained_qat_model_names_the_layer(model):
    with pytest.raises(RuntimeError, match=r"conv1.*seen no data"):
        qt.convert(qt.prepare_qat(model, example_inputs=(X,)))


@pytest.mark.parametrize("loader", [[], iter([])])
def test_calibrate_without_data(prepared, loader):
    with pytest.raises(ValueError, match="no data"):
        qt.calibrate(prepared, loader, progress=False)


def test_calibrate_with_an_empty_batch_names_the_layer(prepared):
    with pytest.raises(ValueError, match=r"conv1.*empty"):
        qt.calibrate(prepared, [torch.empty(0, 1, 8, 8)], progress=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_calibrate_with_non_finite_data_names_the_layer(prepared, value):
    x = X.clone()
    x[0, 0, 3, 3] = value
    with pytest.raises(ValueError, match=r"conv1.*NaN or Inf"):
        qt.calibrate(prepared, [x], progress=False)


def test_calibrate_restores_the_mode_after_an_error(prepared):
    prepared.train()
    with pytest.raises(ValueError, match="NaN"):
        qt.calibrate(prepared, [torch.full_like(X, float("nan"))], progress=False)
    assert prepared.training


def test_calibrate_of_a_plain_model(model):
    with pytest.raises(ValueError, match=r"qt\.prepare"):
        qt.calibrate(model, [X], progress=False)


def test_calibrate_with_a_batch_that_is_no_input(prepared):
    with pytest.raises(TypeError, match="a batch must be"):
        qt.calibrate(prepared, ["text"], progress=False)


@pytest.mark.parametrize("loader", [X, None, 3])
def test_a_loader_that_is_none(model, prepared, loader):
    for run in (
        lambda: qt.calibrate(prepared, loader, progress=False),
        lambda: qt.quantize(model, loader, progress=False),
        lambda: qt.sensitivity(model, loader, progress=False),
    ):
        with pytest.raises(TypeError, match=r"needs a loader: an iterable of batches.*\[batch\]"):
            run()


def test_quantize_of_something_else():
    with pytest.raises(TypeError, match=r"quantize needs a torch\.nn\.Module, got function"):
        qt.quantize(lambda x: x, [X], progress=False)


def test_calibrate_leaves_the_labels_of_dicts_out(model, prepared):
    other = qt.prepare(model, example_inputs=(X,))
    qt.calibrate(prepared, [{"x": X, "label": torch.zeros(2)}], progress=False)
    qt.calibrate(other, [X], progress=False)
    assert torch.equal(qt.convert(prepared)(X), qt.convert(other)(X))
    with pytest.raises(TypeError, match=r"keys \['image'\], of which forward takes none"):
        qt.calibrate(prepared, [{"image": X}], progress=False)


def test_an_interrupted_calibration_keeps_what_it_saw(model, prepared):
    def interrupted():
        yield X
        raise KeyboardInterrupt

    other = qt.prepare(model, example_inputs=(X,))
    with pytest.raises(KeyboardInterrupt):
        qt.calibrate(prepared, interrupted(), progress=False)
    assert not any(isinstance(m, nn.ReLU) and m.inplace for m in prepared.modules())
    qt.calibrate(prepared, [2 * X], progress=False)
    qt.calibrate(other, [X, 2 * X], progress=False)
    assert torch.equal(qt.convert(prepared)(X), qt.convert(other)(X))


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4a4", "qnnpack", "tensorrt"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_data_gives_finite_results(model, recipe, value):
    quantized = qt.quantize(model, [torch.full_like(X, value)], recipe, progress=False)
    assert bool(quantized(X).isfinite().all())


def test_batches_of_varying_size_are_the_data_of_one(model):
    whole = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    split = qt.quantize(model, [whole[:4], whole[4:5], whole[5:]], "w8a8-fast", progress=False)
    once = qt.quantize(model, [whole], "w8a8-fast", progress=False)
    # Histograms are moved to wider bins as the range grows, which may shift an end by a bin.
    torch.testing.assert_close(split(whole), once(whole), rtol=0.02, atol=0.02)


def test_convert_of_a_plain_model(model):
    with pytest.raises(ValueError, match=r"qt\.prepare"):
        qt.convert(model)


def test_convert_and_prepare_twice(prepared):
    qt.calibrate(prepared, batches((2, 1, 8, 8)), progress=False)
    quantized = qt.convert(prepared)
    with pytest.raises(ValueError, match="already"):
        qt.convert(quantized)
    with pytest.raises(ValueError, match="already"):
        qt.prepare(prepared, example_inputs=(X,))


@pytest.mark.parametrize("example_inputs", [None, (), "x"])
def test_prepare_without_example_inputs(model, example_inputs):
    with pytest.raises(TypeError, match="example_inputs"):
        qt.prepare(model, example_inputs=example_inputs)


def test_prepare_with_example_inputs_that_do_not_fit(model):
    with pytest.raises(RuntimeError, match="example inputs"):
        qt.prepare(model, example_inputs=(torch.randn(1, 3, 8, 8),))


def test_prepare_of_something_else():
    with pytest.raises(TypeError, match="Module"):
        qt.prepare(lambda x: x, example_inputs=(X,))


def test_prepare_of_a_scripted_model(model):
    with pytest.raises(TypeError, match="TorchScript"):
        qt.prepare(torch.jit.script(model), example_inputs=(X,))


def test_freeze_on_a_float_model(model):
    with pytest.raises(ValueError, match="prepare_qat"):
        qt.freeze_bn(model)
    with pytest.raises(ValueError, match="prepare_qat"):
        qt.freeze_observers(model)


def test_compare_and_explain_of_a_float_model(model):
    with pytest.raises(ValueError, match=r"qt\.convert"):
        qt.compare(model, model, [X], progress=False)
    with pytest.raises(ValueError, match=r"qt\.prepare"):
        qt.explain(model)


def test_wrong_channel_count_at_run_time(prepared):
    qt.calibrate(prepared, batches((2, 1, 8, 8)), progress=False)
    with pytest.raises(ValueError, match=r"channel"):
        qt.convert(prepared)(torch.randn(1, 2, 8, 8))


def test_export_to_a_missing_folder(prepared, tmp_path):
    qt.calibrate(prepared, batches((2, 1, 8, 8)), progress=False)
    with pytest.raises(FileNotFoundError, match="no folder"):
        qt.export.torchscript(qt.convert(prepared), tmp_path / "a" / "m.pt", (X,))


def test_a_failed_export_leaves_the_old_file_alone(prepared, tmp_path):
    qt.calibrate(prepared, batches((2, 1, 8, 8)), progress=False)
    path = tmp_path / "m.pt"
    path.write_bytes(b"old")

    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = qt.convert(prepared)

        def forward(self, x):
            return self.inner(x) + torch.rand(1)

    with pytest.raises(RuntimeError, match="differs"):
        qt.export.torchscript(Moody(), path, (X,))
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.pt"]


def test_a_truncated_file_is_an_error_and_no_crash(prepared, tmp_path):
    qt.calibrate(prepared, batches((2, 1, 8, 8)), progress=False)
    path = tmp_path / "m.pt"
    qt.export.torchscript(qt.convert(prepared), path, (X,))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(RuntimeError):
        torch.jit.load(path)


@pytest.mark.filterwarnings("ignore:.*NaN or Inf")
def test_calibrate_of_a_qat_model_needs_one_finite_batch(model):
    bad = torch.full_like(X, float("nan"))
    qat = qt.prepare_qat(model, example_inputs=(X,))
    with pytest.raises(ValueError, match=r"conv1.*NaN or Inf"):
        qt.calibrate(qat, [bad, bad], progress=False)
    qt.convert(qt.calibrate(qat, [bad, X], progress=False))

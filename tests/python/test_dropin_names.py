"""Names of torch.ao.quantization in qtoolkit.quantization, and observers by its arguments."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from dropin import BOTH, images, ours, quantized_layers, torch_ao
from torch import nn

import qtoolkit as qt
from qtoolkit.quantization.translate import qconfig_of, spec_of

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.ao warns of its own end


def test_qtoolkit_itself_does_not_import_it():
    code = "import sys, qtoolkit; sys.exit('qtoolkit.quantization' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


FOREIGN = {"Tensor", "Callable", "TypeAliasType", "sys", "torch"}


def test_every_name_is_there_or_says_what_to_use():
    names = [name for name in dir(torch_ao) if not name.startswith("_") and name not in FOREIGN]
    assert len(names) > 100
    silent = []
    for name in names:
        try:
            getattr(ours, name)
        except AttributeError as error:
            if f"has no attribute {name!r}: " not in str(error):
                silent.append(name)
    assert silent == []
    with pytest.raises(AttributeError, match=r"has no attribute 'foo'$"):
        ours.foo  # noqa: B018


def test_all_is_complete():
    public = {name for name in vars(ours) if not name.startswith("_")}
    modules = {"annotations", "NoReturn", "custom_config", "dynamic", "eager", "errors", "fx"}
    assert public - modules - {"translate"} == set(ours.__all__)


OBSERVERS = {
    "minmax": lambda tq: tq.MinMaxObserver(dtype=torch.quint8, qscheme=torch.per_tensor_affine),
    "symmetric": lambda tq: tq.MinMaxObserver(
        dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, quant_min=-127, quant_max=127
    ),
    "moving average": lambda tq: tq.MovingAverageMinMaxObserver(averaging_constant=0.1),
    "per channel": lambda tq: tq.PerChannelMinMaxObserver(ch_axis=1, dtype=torch.quint8),
    "per channel, symmetric": lambda tq: tq.PerChannelMinMaxObserver.with_args(
        dtype=torch.qint8, qscheme=torch.per_channel_symmetric, quant_min=-127, quant_max=127
    )(),
    "moving average per channel": lambda tq: tq.MovingAveragePerChannelMinMaxObserver(
        averaging_constant=0.2, ch_axis=1
    ),
    "four bits": lambda tq: tq.MinMaxObserver(quant_min=0, quant_max=15),
    "fixed": lambda tq: tq.FixedQParamsObserver(scale=1 / 256, zero_point=0),
    "fixed default": lambda tq: tq.default_fixed_qparams_range_neg1to1_observer(),
    "weight": lambda tq: tq.weight_observer_range_neg_127_to_127(),
}


@pytest.mark.parametrize("name", OBSERVERS)
def test_observer_gives_torch_aos_scale_and_zero_point(name):
    results = []
    for tq in (ours, torch_ao):
        observer = OBSERVERS[name](tq)
        for seed in range(3):
            x = images(seed)
            assert observer(x) is x
        results.append(observer.calculate_qparams())
    (scale, zero_point), (their_scale, their_zero_point) = results
    torch.testing.assert_close(scale, their_scale.float(), rtol=1e-6, atol=0)
    assert scale.shape == their_scale.shape
    assert torch.equal(zero_point.long(), their_zero_point.long())


@BOTH
def test_histogram_observer(tq):
    observer = tq.HistogramObserver.with_args(bins=512, reduce_range=False)()
    observer(images(0))
    scale, _ = observer.calculate_qparams()
    x = images(0)
    assert 0.4 * float(x.max() - x.min()) / 255 < float(scale) < float(x.max() - x.min()) / 254


@BOTH
def test_fake_quantize_by_itself(tq):
    fake = tq.FakeQuantize.with_args(
        observer=tq.MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8
    )()
    x = images(0)
    y = fake(x)
    assert 0 < float((x - y).abs().max()) <= float(fake.calculate_qparams()[0])
    fake.apply(tq.disable_fake_quant)
    assert torch.equal(fake(x), x)
    fake.apply(tq.enable_fake_quant)
    fake.apply(tq.disable_observer)
    before = fake.calculate_qparams()
    fake(10 * x)
    assert torch.equal(before[0], fake.calculate_qparams()[0])
    fake.apply(tq.enable_observer)
    fake(10 * x)
    assert not torch.equal(before[0], fake.calculate_qparams()[0])
    assert isinstance(fake, tq.FakeQuantizeBase)


def test_fixed_fake_quantize():
    fake = ours.default_fixed_qparams_range_0to1_fake_quant()
    assert torch.equal(fake(torch.tensor([0.5, 2.0, -1.0])), torch.tensor([0.5, 255 / 256, 0.0]))


DEFAULTS = [name for name in dir(torch_ao) if name.endswith("qconfig") and "default" in name]


@pytest.mark.parametrize(
    "name", [name for name in DEFAULTS if hasattr(ours, name) and "get" not in name]
)
def test_default_qconfig_means_what_torch_aos_means(name):
    mine, theirs = (qconfig_of(getattr(tq, name), "qconfig") for tq in (ours, torch_ao))
    assert mine == theirs


@pytest.mark.parametrize("backend", ["x86", "fbgemm", "qnnpack", "onednn"])
def test_default_qconfigs_of_backends_mean_what_torch_aos_mean(backend):
    for name in ("get_default_qconfig", "get_default_qat_qconfig"):
        mine, theirs = (qconfig_of(getattr(tq, name)(backend), "q") for tq in (ours, torch_ao))
        assert mine == theirs
    target = "x86" if backend == "onednn" else backend
    assert (
        qconfig_of(ours.get_default_qconfig(backend), "q")
        == qt.get_default_qconfig_mapping(target).global_qconfig
    )


def test_observers_without_counterpart():
    class Own(torch_ao.MinMaxObserver):
        pass

    class OwnOfOurs(ours.MinMaxObserver):
        pass

    with pytest.raises(ours.UnsupportedError, match="Own has no counterpart; use one of MinMax"):
        spec_of(Own, "q")
    with pytest.raises(ours.UnsupportedError, match="register it with"):
        spec_of(OwnOfOurs, "q")
    with pytest.raises(ours.UnsupportedError, match=r"got torch.float16; .*model.half"):
        qconfig_of(ours.float16_static_qconfig, "q")
    with pytest.raises(ours.UnsupportedError, match=r"no format has the codes 0\.\.99"):
        ours.MinMaxObserver(quant_min=0, quant_max=99)
    with pytest.raises(ours.UnsupportedError, match="PerChannelMinMaxObserver has no"):
        ours.PerChannelMinMaxObserver(qscheme=torch.per_tensor_affine)
    with pytest.raises(ValueError, match="pass its class"):
        ours.QConfig(ours.MinMaxObserver(), ours.default_weight_observer)
    with pytest.raises(TypeError, match="expected an observer's class"):
        spec_of(3, "q")


@BOTH
def test_options_of_observers_reach_the_model(tq):
    per_channel = tq.default_per_channel_weight_observer
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    for factory, option, value in (
        (tq.HistogramObserver.with_args(bins=64), "bins", 64),
        (
            tq.MovingAverageMinMaxObserver.with_args(averaging_constant=0.5),
            "averaging_constant",
            0.5,
        ),
    ):
        mapping = qt.QConfigMapping().set_global(
            qconfig_of(tq.QConfig(activation=factory, weight=per_channel), "q")
        )
        prepared = qt.prepare(model, mapping, (images(0),))
        found = [m for m in prepared.modules() if isinstance(m, qt.observers.Observer)]
        assert [getattr(m, option) for m in found] == [value] * 2
    # After two batches the range of the last prepared model is halfway between theirs.
    qt.calibrate(prepared, [images(0), images(1)], progress=False)
    low = (images(0).min() + images(1).min()) / 2
    torch.testing.assert_close(found[0].min_val, low)


@BOTH
def test_options_of_fake_quantize_reach_the_training(tq):
    fake = tq.FakeQuantize.with_args(
        observer=tq.MovingAverageMinMaxObserver, averaging_constant=0.5, quant_min=0, quant_max=15
    )
    qconfig = qconfig_of(tq.QConfig(fake, tq.default_per_channel_weight_fake_quant), "q")
    assert qconfig.activation.format == "uint4"
    qat = qt.prepare_qat(
        nn.Sequential(nn.Conv2d(3, 4, 1)), qt.QConfigMapping().set_global(qconfig), (images(0),)
    )
    qat(images(0))
    qat(images(1))
    averages = qt.observers.MovingAverageMinMaxObserver
    first = next(m for m in qat.modules() if isinstance(m, averages))
    torch.testing.assert_close(first.max_val, (images(0).max() + images(1).max()) / 2)


@BOTH
def test_options_that_mean_nothing_here_are_refused(tq):
    weight = tq.MovingAveragePerChannelMinMaxObserver.with_args(
        averaging_constant=0.5, dtype=torch.qint8, qscheme=torch.per_channel_symmetric
    )
    for wrong, message in (
        (weight, "measured anew at each call"),
        (tq.MinMaxObserver.with_args(is_dynamic=True), "use PlaceholderObserver"),
        (
            tq.FakeQuantize.with_args(
                observer=tq.MovingAverageMinMaxObserver, averaging_constant=1, is_dynamic=True
            ),
            "use PlaceholderObserver",
        ),
    ):
        with pytest.raises(ours.UnsupportedError, match=message):
            spec_of(wrong, "q")
    averaged = tq.MovingAverageMinMaxObserver.with_args(
        averaging_constant=0.5, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric
    )
    with pytest.raises(ours.UnsupportedError, match=r"q: weight: averaging_constant=0\.5"):
        qconfig_of(tq.QConfig(tq.default_observer, averaged), "q")
    with pytest.raises(ours.UnsupportedError, match="no upsample_rate of 4"):
        ours.HistogramObserver(upsample_rate=4)


def test_observer_state_of_a_prepared_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    model.qconfig = ours.get_default_qconfig("x86")
    example = (images(0),)
    prepared = ours.prepare(model, example_inputs=example)
    fresh = copy.deepcopy(prepared)
    prepared(images(0))
    state = ours.get_observer_state_dict(prepared)
    assert state
    ours.load_observer_state_dict(fresh, state)
    converted, again = ours.convert(prepared), ours.convert(fresh)
    assert quantized_layers(again) == 2
    assert torch.equal(converted(images(1)), again(images(1)))
    with pytest.raises(ValueError, match="observers are of another model"):
        ours.load_observer_state_dict(fresh, {})

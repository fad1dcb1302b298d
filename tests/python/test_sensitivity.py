"""What quantizing each layer alone costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from networks import Block, Kinds, batches, quantize, settle, sqnr
from ranks import on_ranks
from torch import Tensor, nn
from torch.nn import functional

import qtoolkit as qt
from qtoolkit import layer_simulation
from qtoolkit.layer_formats import qconfigs_of

SHAPE = (4, 3, 24, 24)


def kinds() -> nn.Module:
    return settle(Kinds(), SHAPE)


def small() -> tuple[nn.Module, list[Tensor]]:
    model = nn.Sequential(Block(2, 4, 1), Block(4, 4, 1), nn.Flatten(), nn.Linear(144, 5))
    return settle(model, (4, 2, 6, 6)), batches((4, 2, 6, 6), 3)


def run(model: nn.Module, data: object, *args: object, **options: object) -> qt.Sensitivity:
    return qt.sensitivity(model, data, *args, progress=False, **options)


def test_one_layers_error_is_that_of_the_model_converted_with_it_alone():
    model, data = small()
    found = run(model, data[:1], ("int8", "int4"))
    assert found.layers == ("0.conv1", "0.conv2", "0.downsample.0", "1.conv1", "1.conv2", "3")
    default = qt.get_default_qconfig_mapping("x86").global_qconfig
    entry = next(e for e in found.entries if (e.name, e.format) == ("3", "int8"))
    alone = quantize(model, data[0], mapping=qt.QConfigMapping().set_module_name("3", default))
    with torch.no_grad():
        expected = sqnr(model(data[0]), alone(data[0]))
    # convert rounds the bias as well, and its ranges are of the same data.
    assert entry.sqnr == pytest.approx(expected, abs=0.05)
    assert entry.error == pytest.approx(10 ** (-entry.sqnr / 10))
    assert entry.weights == 144 * 5
    assert found.error("3", "int4") > 20 * found.error("3", "int8")


def test_only_what_depends_on_a_layer_runs_again(monkeypatch):
    model, data = small()
    calls: list[str] = []
    original = layer_simulation._Run.run_node

    def counted(self: object, n: torch.fx.Node) -> object:
        calls.append(n.name)
        return original(self, n)

    monkeypatch.setattr(layer_simulation._Run, "run_node", counted)
    layers = len(run(model, data[:1]).layers)
    whole = len(set(calls))
    assert len(calls) < 0.65 * (layers + 1) * whole
    # The last layer costs its own nodes: the layer, and the output.
    assert calls[-2:] == ["_3", "output"]


def test_every_kind_of_layer_has_an_error_and_formats_are_ordered():
    found = run(kinds(), batches(SHAPE, 2), ("int8", "fp16", "w4a4", "float32"))
    assert len(found.layers) == 12
    for name in found.layers:
        errors = [found.error(name, key) for key in ("float32", "fp16", "int8", "w4a4")]
        assert errors[0] == 0
        assert errors == sorted(errors)
        assert errors[1] > 0
    assert str(found).splitlines()[1].startswith(found.worst("int8")[0])


def test_the_model_is_not_changed():
    model, data = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run(model.train(), data)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_metrics_are_what_their_names_say():
    model, data = small()
    simulation = layer_simulation.Simulation(
        qt.calibrate(qt.prepare(model, example_inputs=data[0]), data, progress=False)
    )
    layer = simulation.layers[0]
    qconfig = qconfigs_of(("int8",))["int8"]
    expected, actual = [], []
    for x in data:
        expected.append(simulation.run(x))
        actual.append(simulation.run_with(layer, qconfig))
    p, q = torch.cat(expected).double(), torch.cat(actual).double()
    kl = functional.kl_div(q.log_softmax(1), p.softmax(1), reduction="batchmean")
    cosine = torch.cosine_similarity(p.flatten(), q.flatten(), dim=0)
    assert run(model, data, metric="kl").entries[0].error == pytest.approx(float(kl))
    assert run(model, data, metric="cosine").entries[0].error == pytest.approx(float(1 - cosine))


def test_a_metric_of_ones_own_is_weighted_by_samples():
    model, data = small()

    def mean_difference(expected: Tensor, actual: Tensor) -> Tensor:
        return (expected - actual).abs().mean()

    uneven = [data[0], data[1][:1]]
    found = run(model, uneven, ("w4a4",), mean_difference)
    assert found.metric == "mean_difference"
    big = run(model, uneven, ("w4a4",), lambda expected, _: float(len(expected) == 4))
    assert big.entries[0].error == pytest.approx(4 / 5)
    with pytest.raises(ValueError, match="metric gave NaN"):
        run(model, data, ("int8",), lambda e, a: float("nan"))


class Branches(nn.Module):
    """Control flow that depends on the data: no single graph, and a layer that is not reached."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU())
        self.second = nn.Conv2d(4, 4, 3)
        self.never = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.never(x) if x.sum() > 1e9 else self.second(x)


def test_parts_that_cannot_be_traced_and_layers_that_data_never_reaches():
    torch.manual_seed(0)
    model = Branches()
    found = run(model, batches((2, 2, 8, 8), 2))
    errors = {entry.name: entry.error for entry in found.entries}
    assert errors["first.0"] > 0
    assert errors["second"] > 0
    assert "never" not in errors or errors["never"] != errors["never"]
    assert "never" not in found.worst()


def test_loaders_of_tuples_dicts_and_sizes_that_vary():
    model, data = small()
    expected = run(model, data)
    assert run(model, [(x, torch.zeros(4)) for x in data]) == expected
    assert run(model, iter(data)) == expected
    assert run(model, [{"input": x, "label": 0} for x in data]) == expected
    uneven = run(kinds(), [torch.randn(2, 3, 24, 24), torch.randn(1, 3, 32, 32)])
    assert all(entry.error > 0 for entry in uneven.entries)


def test_bad_input_says_what_is_wrong():
    model, data = small()
    with pytest.raises(ValueError, match="sensitivity got no data"):
        run(model, [])
    bad = data[1].clone()
    bad[0, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="batch 1 holds 1 NaN or infinite"):
        run(model, [data[0], bad])
    with pytest.raises(ValueError, match=r"unknown format 'int9'.*'w4a4'"):
        run(model, data, ("int9",))
    with pytest.raises(TypeError, match="formats must be a tuple of names"):
        run(model, data, "int8")
    with pytest.raises(ValueError, match="unknown metric 'psnr': use sqnr, cosine, kl"):
        run(model, data, metric="psnr")
    with pytest.raises(ValueError, match="no layer that can be quantized"):
        run(nn.Flatten(), data)
    with torch.no_grad():
        model[3].bias[0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        run(model, data)


class Interrupted:
    """A metric that stops the run after some calls, as Ctrl-C would."""

    __name__ = "squared"

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self, expected: Tensor, actual: Tensor) -> float:
        if self.calls == 0:
            raise KeyboardInterrupt
        self.calls -= 1
        return float((expected - actual).square().mean())


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path):
    model, data = small()
    file = tmp_path / "sensitivity.json"
    expected = run(model, data, ("int8",), Interrupted(-1))
    with pytest.raises(KeyboardInterrupt):
        run(model, data, ("int8",), Interrupted(8), resume=file)
    rest = Interrupted(3 * 6 - 8)
    assert run(model, data, ("int8",), rest, resume=file) == expected
    assert rest.calls == 0
    # All is done: nothing is left to measure.
    assert run(model, data, ("int8",), Interrupted(0), resume=file) == expected


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(tmp_path: Path):
    model, data = small()
    file = tmp_path / "sensitivity.json"
    run(model, data, resume=file)
    with pytest.raises(ValueError, match=r"sensitivity\.json is of another run"):
        run(model, data[:2], resume=file)
    file.write_text(json.dumps(json.loads(file.read_text()))[:-9])
    with pytest.raises(ValueError, match=r"sensitivity\.json is no checkpoint"):
        run(model, data, resume=file)


def _on_share(rank: int, folder: str) -> qt.Sensitivity:
    model, data = small()
    share = data[rank::2]  # two batches and one
    return run(model, share, minmax(), "kl", resume=f"{folder}/s.json")


def minmax() -> dict[str, qt.QConfig]:
    """Formats whose ranges do not depend on which rank saw which data."""
    weight = qt.TensorSpec("int8", symmetric=True, observer="minmax")
    return {f: qt.QConfig(qt.TensorSpec(f, observer="minmax"), weight) for f in ("uint8", "uint4")}


def test_ranks_share_the_data_and_all_have_the_result_of_all(tmp_path: Path):
    model, data = small()
    first, second = on_ranks(_on_share, str(tmp_path))
    assert first == second
    assert {file.name for file in tmp_path.iterdir()} == {"s.json.rank0", "s.json.rank1"}
    alone = run(model, data, minmax(), "kl")
    for a, b in zip(first.entries, alone.entries):
        assert (a.name, a.format) == (b.name, b.format)
        assert a.error == pytest.approx(b.error, rel=1e-6)


def _empty_on_one(rank: int) -> None:
    model, data = small()
    run(model, data if rank == 0 else [])


def test_a_rank_without_data_is_an_error_on_all():
    first, second = on_ranks(_empty_on_one)
    assert "failed on rank 1" in str(first)
    assert "got no data" in str(second)


def test_the_page_names_every_layer(tmp_path: Path):
    model, data = small()
    found = run(model, data, ("int8", "int4"))
    found.to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert text.count("<tr>") == 1 + len(found.layers)
    assert text.count("<svg") == 2
    assert all(f'data-sort="{name}"' in text for name in found.layers)


def test_functional_relu_is_fused():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.ConvTranspose2d(2, 4, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return functional.relu(self.c(x)).mean((2, 3))

    found = run(Net(), batches((2, 2, 4, 4), 1))
    assert found.entries[0].name == "c"
    assert 1e-8 < found.entries[0].error < 1e-3

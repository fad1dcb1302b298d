"""Training and calibration in two processes: all ranks get the same model, bit for bit."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from networks import Kinds, ResNet, batches, digits, settle, trained
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import qtoolkit as qt
from qtoolkit.fake_quantize import FakeQuantize

X = torch.randn(2, 1, 8, 8)


def share(rank: int) -> list[tuple[Tensor, Tensor]]:
    return digits()[0][rank::2]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def fit(model: nn.Module, data: list[tuple[Tensor, Tensor]], rate: float = 0.005) -> None:
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    for x, y in data:
        step(model, optimizer, x, y)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[key]) for key, value in first.items()
    )


def differences(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [key for key, value in first.items() if not torch.equal(value, second[key])]


def accuracy(model: nn.Module) -> float:
    return qt.evaluate(model, digits()[1], progress=False)


def prepared(model: nn.Module | None = None, target: str = "x86") -> nn.Module:
    mapping = qt.get_default_qat_qconfig_mapping(target)
    return qt.prepare_qat(model or trained(), mapping, example_inputs=(X,))


# --- training -------------------------------------------------------------------------------------


def ddp(rank: int, weights: Any, broadcast_buffers: bool) -> Any:
    model = ResNet()
    model.load_state_dict(weights)
    qat = prepared(model)
    wrapped = DistributedDataParallel(qat, broadcast_buffers=broadcast_buffers)
    fit(wrapped, share(rank))
    converted = qt.convert(wrapped)
    return state(qat), state(converted), accuracy(converted)


@pytest.mark.parametrize("broadcast_buffers", [True, False])
def test_both_ranks_of_a_ddp_run_convert_to_the_same_model(broadcast_buffers):
    first, second = on_ranks(ddp, trained().state_dict(), broadcast_buffers)
    assert differences(first[0], second[0]) == []
    assert differences(first[1], second[1]) == []
    assert any(value.dtype == torch.int8 for value in first[1].values())
    assert first[2] == second[2] >= accuracy(trained()) - 0.01


def one_step(rank: int, weights: Any) -> Any:
    model = ResNet()
    model.load_state_dict(weights)
    qat = prepared(model)
    own = copy.deepcopy(qat)
    x, y = share(rank)[0]
    qt.distributed.remove_synchronizer(own)
    own(x)
    fit(DistributedDataParallel(qat), [(x, y)])
    return {
        "own": [
            own.x_fake_quantize.observer.min_val,
            own.relu_fake_quantize.observer.max_val,
            own.bn1.running_var,
        ],
        "merged": [
            qat.x_fake_quantize.observer.min_val,
            qat.relu_fake_quantize.observer.max_val,
            qat.bn1.running_var,
        ],
        "quantizers": {
            name: (module.scale, module.zero_point, module.observer.calculate_qparams())
            for name, module in qat.named_modules()
            if isinstance(module, FakeQuantize) and not module.is_weight
        },
        "batches": qat.bn1.num_batches_tracked - weights["bn1.num_batches_tracked"],
    }


def test_after_a_step_state_is_the_mean_of_what_the_ranks_saw():
    first, second = on_ranks(one_step, trained().state_dict())
    for own, other, merged in zip(first["own"], second["own"], first["merged"]):
        assert torch.equal(merged, ((own.double() + other.double()) / 2).float())
    assert not torch.equal(first["own"][1], second["own"][1])
    assert not torch.equal(first["own"][2], second["own"][2])
    assert first["quantizers"]
    for name, (scale, zero_point, expected) in first["quantizers"].items():
        assert torch.equal(scale, expected[0]), name
        assert torch.equal(zero_point, expected[1]), name
    assert first["batches"] == 1


def accumulate(rank: int, weights: Any) -> Any:
    model = ResNet()
    model.load_state_dict(weights)
    qat = prepared(model)
    wrapped = DistributedDataParallel(qat)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.005)
    data = share(rank)[:6]
    for (x0, y0), (x1, y1) in zip(data[::2], data[1::2]):
        with wrapped.no_sync():
            nn.functional.cross_entropy(wrapped(x0), y0).backward()
        step(wrapped, optimizer, x1, y1)
    return state(qat), state(qt.convert(qat))


def test_gradient_accumulation_without_synchronised_gradients():
    first, second = on_ranks(accumulate, trained().state_dict())
    assert differences(first[0], second[0]) == []
    assert differences(first[1], second[1]) == []


class Branching(nn.Module):
    """Has a part that cannot be traced: its prepared form is no graph as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.tail = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        if x.mean() > 1e9:
            x = x + 1
        return self.tail(x.mean((2, 3)))


def with_lsq(weights: Any) -> nn.Module:
    model = ResNet()
    model.load_state_dict(weights)
    activation = qt.TensorSpec("uint4", method="lsq")
    weight = qt.TensorSpec("int4", "per_channel", symmetric=True, method="lsq")
    mapping = qt.QConfigMapping().set_global(qt.QConfig(activation, weight))
    return qt.prepare_qat(model, mapping, example_inputs=(X,))


def learned(rank: int, weights: Any) -> Any:
    qat, alone = with_lsq(weights), with_lsq(weights)
    qt.distributed.remove_synchronizer(alone)
    batch = share(rank)[0][0] * (1 + rank)
    alone(batch)
    wrapped = DistributedDataParallel(qat)
    wrapped(batch)
    begun = [model.relu_fake_quantize.scale.clone() for model in (alone, qat)]
    fit(wrapped, share(rank)[:3])
    return begun, state(qat), state(qt.convert(wrapped))


def test_learned_scales_begin_alike_on_all_ranks():
    first, second = on_ranks(learned, trained().state_dict())
    (own, begun), (other, also) = first[0], second[0]
    assert own != other
    assert begun == also == ((own.double() + other.double()) / 2).float()
    assert first[1]["relu_fake_quantize.scale"] != begun
    assert differences(first[1], second[1]) == []
    assert differences(first[2], second[2]) == []


def learned_and_sharded(rank: int, weights: Any) -> Any:
    qat = with_lsq(weights)
    data = share(rank)
    qt.calibrate(qat, data[:1], progress=False)
    begun = qat.conv1.weight_fake_quant.scale.detach().clone()
    fully_shard(qat)
    fit(qat, data[:4])
    converted = qt.convert(qat)
    scale = qat.conv1.weight_fake_quant.scale.full_tensor()
    return begun, scale.detach(), state(converted)


def test_learned_scales_are_sharded():
    first, second = on_ranks(learned_and_sharded, trained().state_dict())
    assert torch.equal(first[1], second[1])
    assert first[1].shape == (16,)
    assert not torch.equal(first[0], first[1])
    assert torch.allclose(first[0], first[1], rtol=0.1)
    assert differences(first[2], second[2]) == []


def sharded_too_early(rank: int, weights: Any) -> None:
    qat = fully_shard(with_lsq(weights))
    qat(share(rank)[0][0])


def test_learned_scales_that_are_sharded_before_they_begin_are_an_error():
    for result in on_ranks(sharded_too_early, trained().state_dict()):
        assert isinstance(result, RuntimeError)
        assert "run a batch in training mode, or qt.calibrate, before fully_shard" in str(result)


def scheduled(rank: int) -> Any:
    torch.manual_seed(0)
    qat = prepared(Branching())
    copies = copy.deepcopy(qat), pickle.loads(pickle.dumps(qat))
    schedule = qt.QATSchedule(start_fake_quant=2, freeze_bn=4, freeze_observers=5)
    states = []
    for model in (qat, *copies):
        wrapped = DistributedDataParallel(model, broadcast_buffers=False)
        optimizer = torch.optim.SGD(wrapped.parameters(), 0.01)
        for index, (x, y) in enumerate(share(rank)[:7]):
            schedule(wrapped, index)
            step(wrapped, optimizer, x, y)
        states.append((state(model), state(qt.convert(model))))
    return type(qat).__name__, states


def test_models_that_are_no_graph_and_copies_synchronise_too():
    (kind, first), (_, second) = on_ranks(scheduled)
    assert kind == "Branching"
    for own, other in zip(first, second):
        assert differences(own[0], other[0]) == []
        assert differences(own[1], other[1]) == []
    assert same(first[0][0], first[1][0])
    assert same(first[0][0], first[2][0])


def copied_graphs(rank: int, weights: Any) -> Any:
    model = ResNet()
    model.load_state_dict(weights)
    qat = prepared(model)
    results = []
    compiled = torch.compile(qat, backend="eager")
    for each in (copy.deepcopy(qat), pickle.loads(pickle.dumps(qat)), compiled):
        fit(DistributedDataParallel(each, broadcast_buffers=False), share(rank)[:3])
        results.append((state(qt.distributed.unwrapped(each)), state(qt.convert(each))))
    return results


@pytest.mark.filterwarnings("ignore")
def test_copies_pickles_and_compiled_models_synchronise():
    first, second = on_ranks(copied_graphs, trained().state_dict())
    for own, other in zip(first, second):
        assert differences(own[0], other[0]) == []
        assert differences(own[1], other[1]) == []


def fsdp(rank: int, weights: Any, layers: bool) -> Any:
    model = ResNet()
    model.load_state_dict(weights)
    # With one scale for a weight, a convolution asks for the batch norm's parameters.
    qat = prepared(model, "qnnpack" if layers else "x86")
    if layers:
        for child in list(qat.modules()):
            if isinstance(child, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
                fully_shard(child)
    fully_shard(qat)
    sharded = qat.conv1.weight
    assert sharded.to_local().shape[0] == 8
    fit(qat, share(rank))
    before = type(qat), dict(qat.__dict__)
    converted = qt.convert(qat)
    assert (type(qat), dict(qat.__dict__)) == before
    assert qat.conv1.weight is sharded
    fit(qat, share(rank)[:1])  # goes on
    whole = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state(qat).items()}
    assert not any("FSDP" in type(module).__name__ for module in converted.modules())
    return whole, state(converted), accuracy(copy.deepcopy(converted))


@pytest.mark.parametrize("layers", [False, True])
def test_both_ranks_of_an_fsdp_run_convert_to_the_same_model(layers):
    first, second = on_ranks(fsdp, trained().state_dict(), layers)
    assert differences(first[0], second[0]) == []
    assert differences(first[1], second[1]) == []
    assert first[2] == second[2] >= accuracy(trained()) - 0.01


def fsdp_and_ddp(rank: int, weights: Any) -> Any:
    results = []
    for wrap in (DistributedDataParallel, fully_shard):
        model = ResNet()
        model.load_state_dict(weights)
        qat = prepared(model)
        fit(wrap(qat), share(rank)[:3])
        results.append(state(qt.convert(qat)))
    return results


def test_fsdp_and_ddp_train_the_same_model():
    ddp_model, fsdp_model = on_ranks(fsdp_and_ddp, trained().state_dict())[0]
    assert ddp_model.keys() == fsdp_model.keys()
    for key, value in ddp_model.items():
        difference = (value.double() - fsdp_model[key].double()).abs().max()
        assert difference <= (1 if value.dtype in (torch.int8, torch.uint8) else 1e-4), key


# --- calibration ----------------------------------------------------------------------------------


def with_observer(name: str) -> qt.QConfigMapping:
    weight = qt.TensorSpec("int8", "per_channel", symmetric=True, observer="per_channel_minmax")
    return qt.QConfigMapping().set_global(qt.QConfig(qt.TensorSpec("uint8", observer=name), weight))


def calibrated(observer: str, data: list[Tensor]) -> nn.Module:
    model = settle(Kinds(), (8, 3, 32, 32))
    model = qt.prepare(model, with_observer(observer), example_inputs=(data[0],))
    return qt.calibrate(model, data, progress=False)


def calibrate_share(rank: int, observer: str) -> Any:
    data = batches((4, 3, 32, 32), 5)
    model = calibrated(observer, data[:3] if rank == 0 else data[3:])
    return state(model), state(qt.convert(model))


def test_calibration_over_two_ranks_is_calibration_on_all_data():
    first, second = on_ranks(calibrate_share, "minmax")
    alone = calibrated("minmax", batches((4, 3, 32, 32), 5))
    for rank in (first, second):
        assert differences(rank[0], state(alone)) == []
        assert differences(rank[1], state(qt.convert(alone))) == []


def test_histograms_of_two_ranks_add_up():
    first, second = on_ranks(calibrate_share, "histogram")
    assert differences(first[0], second[0]) == []
    assert differences(first[1], second[1]) == []
    alone = calibrated("histogram", batches((4, 3, 32, 32), 5))
    for name, expected in state(alone).items():
        value = first[0][name]
        if name.endswith(("min_val", "max_val")):
            assert torch.equal(value, expected), name
        elif name.endswith("histogram"):
            assert value.sum() == expected.sum(), name
    expected = state(qt.convert(alone))
    for name, value in first[1].items():
        if name.endswith("scale"):
            assert torch.allclose(value, expected[name], rtol=0.02), name


def calibrate_badly(rank: int) -> Any:
    data = batches((4, 3, 32, 32), 2)
    if rank == 1:
        data[1][0, 0, 0, 0] = float("nan")
    calibrated("minmax", data)


def test_a_failure_of_one_rank_in_calibration_is_reported_on_all():
    first, second = on_ranks(calibrate_badly)
    assert isinstance(second, ValueError)
    assert "NaN" in str(second)
    assert isinstance(first, RuntimeError)
    assert "calibrate failed on rank 1: ValueError: observer 'stem (input)'" in str(first)


def calibrate_nothing(rank: int) -> Any:
    calibrated("minmax", batches((4, 3, 32, 32), 1))
    model = qt.prepare(settle(Kinds(), (8, 3, 32, 32)), None, torch.zeros(1, 3, 32, 32))
    qt.calibrate(model, [torch.zeros(1, 3, 32, 32)][rank:], progress=False)


def test_a_rank_without_calibration_data_is_an_error_on_all():
    first, second = on_ranks(calibrate_nothing)
    assert "got no data" in str(second)
    assert "failed on rank 1: ValueError: calibrate got no data" in str(first)


# --- ranks that do not fit ------------------------------------------------------------------------


def other_mapping(rank: int) -> Any:
    mapping = qt.get_default_qat_qconfig_mapping("x86")
    if rank == 1:
        mapping = mapping.set_module_name("layer1.conv2", None)
    qat = qt.prepare_qat(settle(ResNet(), (8, 1, 8, 8)), mapping, example_inputs=(X,))
    fit(qat, share(rank)[:1])


def test_ranks_of_different_mappings_get_an_error():
    for result in on_ranks(other_mapping):
        assert isinstance(result, RuntimeError)
        assert "rank 0 and rank 1 are not quantized alike: rank 0 has 'layer1" in str(result)


def frozen_on_one(rank: int) -> Any:
    qat = prepared(settle(ResNet(), (8, 1, 8, 8)))
    fit(qat, share(rank)[:2])
    if rank == 1:
        qt.freeze_observers(qat, "layer2.conv1")
    fit(qat, share(rank)[:1])


def test_ranks_that_freeze_different_layers_get_an_error():
    for result in on_ranks(frozen_on_one):
        assert isinstance(result, RuntimeError)
        assert "is not frozen and rounding on rank 0 and frozen and rounding on rank 1" in str(
            result
        )


# --- one process ----------------------------------------------------------------------------------


def test_one_process_computes_what_it_did_without():
    qat, plain = prepared(), prepared()
    qt.distributed.remove_synchronizer(plain)
    torch.manual_seed(0)
    fit(qat, share(0)[:3])
    fit(plain, share(0)[:3])
    assert differences(state(qat), state(plain)) == []
    qt.synchronize(qat)
    assert differences(state(qat), state(plain)) == []
    assert dist.is_available()
    assert not dist.is_initialized()


@pytest.mark.filterwarnings("ignore")
def test_one_process_compiles_the_model_as_one_graph():
    qat = prepared()
    expected = copy.deepcopy(qat)(X)
    actual = torch.compile(qat, backend="eager", fullgraph=True)(X)
    assert torch.allclose(actual, expected, atol=1e-5)


def test_the_converted_model_does_not_synchronise():
    for model in (prepared(), prepared(Branching())):
        qt.calibrate(model, [X], progress=False)
        converted = qt.convert(model)
        kinds = {type(module).__name__ for module in converted.modules()}
        assert "Synchronizer" not in kinds
        assert not converted._forward_hooks

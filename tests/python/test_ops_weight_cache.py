"""Packed weights are kept, yet conv2d and linear stay functions of their arguments."""

import copy
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from op_reference import scale, zero_point
from test_ops_conv2d import GEOMETRIES, check, make_case
from test_ops_linear import expected as expected_linear
from test_ops_linear import make_case as make_linear_case

from qtoolkit import _C, ops

ALIVE = make_case("1x1")


def settled():
    """The cache's state without what tests before left: a call that packs releases it."""
    gc.collect()
    ALIVE["weight"] = ALIVE["weight"].clone()
    check(ALIVE)
    return _C.weight_cache_state()


def packings():
    return _C.weight_cache_state()["packings"]


@pytest.mark.parametrize("geometry", ["3x3", "depthwise"])
@pytest.mark.parametrize("inference", [False, True])
def test_changes_in_place_are_seen(geometry, inference):
    with torch.inference_mode(inference):
        case = make_case(geometry)
        before = check(case)
        for name, change in {
            "weight": lambda t: t.copy_(t.flip(0)),
            "bias": lambda t: t[3].add_(5000),
            "weight_scale": lambda t: t.mul_(1.5),
            "x_scale": lambda t: t.mul_(1.25),
            "x_zero_point": lambda t: t.add_(4),
            "y_scale": lambda t: t.mul_(0.75),
            "y_zero_point": lambda t: t.sub_(20),
        }.items():
            change(case[name])
            after = check(case)
            assert not torch.equal(after, before), name
            before = after


def test_one_changed_element_of_an_ordinary_weight_is_seen():
    case = make_case("3x3")
    check(case)
    for index in ((0, 0, 0, 0), (31, 15, 2, 2), (17, 3, 1, 1)):
        case["weight"][index] = -case["weight"][index] - 1
        check(case)


def test_new_contents_through_data_are_seen():
    case = make_case("3x3")
    check(case)
    case["weight"].data.copy_(case["weight"].flip(1))
    check(case)
    case["weight"].data = case["weight"].flip(2).contiguous()
    check(case)


def test_a_loaded_state_dict_is_seen():
    module = torch.nn.Module()
    case = make_case("3x3")
    module.register_buffer("weight", case["weight"])
    check(case)
    module.load_state_dict({"weight": case["weight"].flip(0).clone()})
    assert module.weight is case["weight"]
    check(case)


def test_copies_are_tensors_of_their_own():
    case = make_case("3x3")
    check(case)
    other = copy.deepcopy(case)
    other["weight"].neg_()
    check(other)
    check(case)


def test_new_contents_of_a_sparse_view_are_seen():
    case = make_case("3x3")
    wide = case["weight"].repeat_interleave(2, 1)
    case["weight"] = wide[:, ::2]
    for change in (
        lambda: wide.data.copy_(wide.flip(0)),
        lambda: case["weight"].numpy().fill(3),
        lambda: case["weight"].data.fill_(-2),
    ):
        check(case)
        change()
    check(case)


def test_an_alias_that_counts_its_own_versions_is_seen():
    case = make_case("3x3")
    weight = case["weight"]
    check(case)
    weight[0, 0, 1, 1] ^= 64
    case["weight"] = weight.data  # version 0, as the weight had before
    check(case)
    case["weight"].data[0, 1, 1, 0] ^= 64
    case["weight"] = case["weight"].data.clone()
    check(case)


def test_what_dead_weights_left_is_released_by_later_calls():
    before = settled()
    cases = [make_case("3x3") for _ in range(9)]
    for case in cases:
        check(case)
    full = _C.weight_cache_state()
    assert full["packed_weights"] == before["packed_weights"] + 9
    del case, cases
    gc.collect()
    for _ in range(64 + full["packed_weights"]):
        ops.conv2d(**ALIVE)
    assert _C.weight_cache_state() == {**before, "packings": full["packings"]}


def test_a_call_that_packs_releases_what_dead_weights_left():
    before = settled()
    for seed in range(20):
        case = make_case("1x1")
        case["weight"] = case["weight"].roll(seed, 0).clone()
        check(case)
        del case
        gc.collect(0)
    assert _C.weight_cache_state()["packed_weights"] <= before["packed_weights"] + 1
    assert packings() == before["packings"] + 20


def test_one_weight_serves_many_settings():
    case = make_case("1x1")
    before = packings()
    for zp in [*range(20), 0, 1, 19]:
        case["x_zero_point"] = zero_point(zp)
        check(case)
    for bias in (None, case["bias"], case["bias"] + 1, None):
        case["bias"] = bias
        check(case)
    assert packings() == before + 1


@pytest.mark.parametrize("inference", [False, True])
def test_views_share_the_packed_weight(inference):
    with torch.inference_mode(inference):
        case = make_case("3x3")
        weight = case["weight"]
        check(case)
        before = packings()
        for view in (weight.view_as(weight), weight.detach(), weight[:]):
            case["weight"] = view
            check(case)
        assert packings() == before
        weight.neg_()
        case["weight"] = weight.detach()
        check(case)


def test_many_views_of_one_weight_keep_a_bounded_amount():
    case = make_linear_case(oc=40)
    wide = case["weight"].repeat(8, 1)
    before = settled()
    for first in range(0, 280, 5):
        case["weight"] = wide[first : first + 40]
        assert torch.equal(ops.linear(**case), expected_linear(case))
    kept = _C.weight_cache_state()["packed_weights"] - before["packed_weights"]
    assert 8 <= kept <= 32


def test_first_calls_at_once_leave_one_packed_weight():
    weights = [torch.full((256, 256, 3, 3), i, dtype=torch.int8) for i in range(12)]
    case = make_case("3x3", x=torch.zeros(1, 256, 3, 3, dtype=torch.uint8), bias=None)
    case["weight_scale"] = torch.tensor([0.01])
    before = settled()
    barrier = threading.Barrier(4)

    def work(_):
        for weight in weights:
            barrier.wait()
            ops.conv2d(**{**case, "weight": weight})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    after = _C.weight_cache_state()
    assert after["packed_weights"] == before["packed_weights"] + len(weights)
    assert after["packed_bytes"] == before["packed_bytes"] + len(weights) * 256 * 256 * 9
    assert after["channel_terms"] == before["channel_terms"] + len(weights)


def test_one_weight_serves_other_geometries():
    case = make_case("dilated")
    for dilation in (1, 2, 1):
        case["dilation"] = [1, dilation]
        check(case)
    grouped, dense = make_case("groups"), make_case("3x3")
    weight = grouped["weight"]  # [36, 8, 3, 3]
    check(grouped)
    single = dict(dense, weight=weight, weight_scale=grouped["weight_scale"], bias=grouped["bias"])
    single["x"] = dense["x"][:, :8]
    check(single)
    check(grouped)


def test_views_of_one_storage_are_told_apart():
    flat = torch.cat([make_linear_case()["weight"].flatten()] * 2)
    flat[2560:] = flat[:2560].flip(0)
    case = make_linear_case()
    for part in (flat[:2560].view(40, 64), flat[2560:].view(40, 64)):
        case["weight"] = part
        assert torch.equal(ops.linear(**case), expected_linear(case))


@pytest.mark.parametrize("inference", [False, True])
def test_a_weight_transposed_in_place_is_seen(inference):
    with torch.inference_mode(inference):
        case = make_linear_case(k=40, oc=40)
        for _ in range(3):
            assert torch.equal(ops.linear(**case), expected_linear(case))
            case["weight"].t_()


def test_threads_share_it():
    cases = [make_case(geometry) for geometry in list(GEOMETRIES)[:6]]
    expected = [ops.conv2d(**case) for case in cases]
    for case in cases:
        case["weight"] = case["weight"].clone()

    def work(turn):
        i = turn % len(cases)
        case = dict(cases[i])
        if turn % 7 == 0:
            case["weight"] = case["weight"].clone()
        return torch.equal(ops.conv2d(**case), expected[i])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(300)))


def test_a_bad_scale_after_a_good_one_is_refused():
    case = make_case("3x3")
    check(case)
    case["weight_scale"][5] = 0
    with pytest.raises(ValueError, match="weight_scale must be positive"):
        ops.conv2d(**case)
    case["weight_scale"][5] = 0.01
    case["y_scale"] = scale(1e-38)
    case["x_scale"] = scale(1e30)
    with pytest.raises(ValueError, match="overflows float32"):
        ops.conv2d(**case)

"""Times of layers: each call is told, and CUDA is waited for before and after it."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qtoolkit.layer_times import timed_calls, wait_for


@pytest.fixture
def waited(monkeypatch):
    """The devices that were waited for."""
    devices = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: devices.append(str(device)))
    return devices


def test_cuda_is_waited_for_and_the_cpu_is_not(waited):
    with FakeTensorMode():
        on_gpu = torch.empty(2, device="cuda:0")
    wait_for((torch.ones(2), 3))
    assert waited == []
    wait_for({"y": [on_gpu, torch.ones(2)]})
    assert waited == ["cuda:0"]


def test_each_call_is_told_and_hooks_are_gone_afterwards(waited):
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    told = []
    with timed_calls(model, lambda layer, ms: told.append((layer, ms))):
        model(torch.ones(1, 2))
    assert [layer for layer, _ in told] == list(model)
    assert all(ms >= 0 for _, ms in told)
    model(torch.ones(1, 2))
    assert len(told) == 2


def test_a_layer_on_a_gpu_is_timed_between_two_waits(waited):
    with FakeTensorMode():
        layer = nn.Linear(2, 2, device="cuda:0")
        with timed_calls([layer], lambda *_: waited.append("told")):
            layer(torch.empty(1, 2, device="cuda:0"))
    assert waited == ["cuda:0", "cuda:0", "told"]

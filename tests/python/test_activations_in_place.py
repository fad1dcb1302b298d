"""Activation functions overwrite their input in calibration, where nothing else reads it."""

import torch
from torch import nn

import qtoolkit as qt
from qtoolkit.graph.activations_in_place import activations_in_place


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.alone = nn.ReLU()
        self.second = nn.Conv2d(3, 3, 1)
        self.shared = nn.ReLU()
        self.of_input = nn.ReLU()

    def forward(self, x):
        y = self.second(self.alone(self.conv(x)))
        return self.shared(y) + y + self.of_input(x)


def prepared():
    torch.manual_seed(0)
    return qt.prepare(Network(), None, (torch.randn(1, 3, 4, 4),))


def test_only_where_nothing_else_reads_the_input():
    model = prepared()
    with activations_in_place(model):
        assert model.alone.inplace
        assert not model.shared.inplace
        assert not model.of_input.inplace
    assert not model.alone.inplace


def test_a_layer_with_a_hook_keeps_its_output():
    model = prepared()
    model.conv.register_forward_hook(lambda *_: None)
    with activations_in_place(model):
        assert not model.alone.inplace


def test_calibration_finds_the_same_ranges_and_leaves_its_data_alone():
    model, other = prepared(), prepared()
    batches = [torch.randn(2, 3, 4, 4) for _ in range(3)]
    copies = [batch.clone() for batch in batches]
    qt.calibrate(model, batches, progress=False)
    with torch.no_grad():
        for batch in copies:
            other(batch)
    assert all(map(torch.equal, batches, copies))
    for (name, ours), theirs in zip(model.state_dict().items(), other.state_dict().values()):
        assert not isinstance(ours, torch.Tensor) or torch.equal(ours, theirs), name
    assert not model.alone.inplace

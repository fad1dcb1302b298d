"""evaluate and model_size."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from qtoolkit.metrics import evaluate, model_size


class Fixed(nn.Module):
    """Gives its input back as logits, and records the mode and gradient mode it ran in."""

    def __init__(self):
        super().__init__()
        self.inner = nn.BatchNorm1d(3)
        self.outer = nn.Dropout()
        self.calls = []

    def forward(self, x):
        self.calls.append((self.training, self.inner.training, torch.is_grad_enabled()))
        return x


def logits_with_rank(rank, label, classes=10):
    """One sample's logits in which exactly `rank` classes lie above the label's."""
    logits = torch.arange(classes, dtype=torch.float32)
    position = classes - 1 - rank
    logits[[label, position]] = logits[[position, label]]
    return logits


RANKS = [0, 0, 1, 4, 5, 9, 0]
LABELS = torch.tensor([3, 1, 4, 1, 5, 9, 2])
LOGITS = torch.stack([logits_with_rank(r, int(y)) for r, y in zip(RANKS, LABELS)])


def loader(batch_size=3):
    return DataLoader(TensorDataset(LOGITS, LABELS), batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [1, 3, 7])
@pytest.mark.parametrize(("metric", "expected"), [("top1", 3 / 7), ("top5", 5 / 7)])
def test_accuracy_counts_every_sample_once(metric, expected, batch_size):
    result = evaluate(Fixed(), loader(batch_size), metric, progress=False)
    assert isinstance(result, float)
    assert result == pytest.approx(expected, abs=1e-12)


def test_a_callable_gives_a_score_for_each_sample_or_the_batch():
    def per_sample(output, label):
        return (output.argmax(1) == label).float()

    def per_batch(output, label):
        return per_sample(output, label).mean().item()

    for metric in (per_sample, per_batch):
        assert evaluate(Fixed(), loader(3), metric, progress=False) == pytest.approx(3 / 7)


def test_max_batches_limits_the_batches():
    model = Fixed()
    assert evaluate(model, loader(2), max_batches=2, progress=False) == 0.5
    assert len(model.calls) == 2


def test_runs_in_eval_mode_without_gradient_and_restores_every_mode():
    model = Fixed()
    model.inner.eval()  # a batch norm kept frozen while the rest trains
    evaluate(model, loader(7), progress=False)
    assert model.calls == [(False, False, False)]
    assert (model.training, model.inner.training, model.outer.training) == (True, False, True)


def test_modes_are_restored_after_an_error():
    model = Fixed()
    with pytest.raises(TypeError, match=r"\(input, label\)"):
        evaluate(model, [LOGITS], progress=False)
    assert model.training
    assert model.inner.training


def test_evaluates_scripted_models_and_functions():
    scripted = torch.jit.script(nn.Sequential(nn.Identity(), nn.Dropout()))
    scripted.train()
    assert evaluate(scripted, loader(), progress=False) == pytest.approx(3 / 7)
    assert scripted.training
    assert evaluate(lambda x: x, loader(), progress=False) == pytest.approx(3 / 7)


def test_batches_go_to_the_device_of_the_model_or_the_one_given():
    seen = []

    class OnMeta(nn.Linear):
        def forward(self, x):
            seen.append(x.device.type)
            return torch.zeros(x.shape)

    def metric(output, label):
        seen.append(label.device.type)
        return torch.ones(len(output))

    assert evaluate(OnMeta(2, 2, device="meta"), loader(7), metric, progress=False) == 1.0
    assert evaluate(OnMeta(2, 2), loader(7), metric, progress=False, device="meta") == 1.0
    assert seen == ["meta"] * 4


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(LOGITS, LABELS))


def test_loader_without_length():
    assert evaluate(Fixed(), DataLoader(Stream(), batch_size=3)) == pytest.approx(3 / 7)


def test_progress_bar_is_shown_on_request_only(capsys):
    evaluate(Fixed(), loader(), progress=False)
    assert capsys.readouterr().err == ""
    evaluate(Fixed(), loader(), progress=True)
    assert "evaluate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("batches", "options", "error", "message"),
    [
        ([], {}, ValueError, "the loader gave no data"),
        (iter([]), {}, ValueError, "the loader gave no data"),
        ([(LOGITS[:0], LABELS[:0])], {}, ValueError, "the loader gave no data"),
        ([LOGITS], {}, TypeError, "must be .input, label., got Tensor"),
        ([(LOGITS, LABELS, LABELS)], {}, TypeError, "got tuple of 3 items"),
        ([{"x": LOGITS}], {}, TypeError, "got dict"),
        ([("a", LABELS)], {}, TypeError, "tensor"),
        ([(LOGITS, LABELS[:2])], {}, TypeError, r"labels of shape \[7\]"),
        ([(LOGITS, 3)], {}, TypeError, r"labels of shape \[7\]"),
        ([(LOGITS[0], LABELS[:1])], {}, TypeError, r"outputs of shape \[N, classes\]"),
        ([(LOGITS[:, :4], LABELS)], {"metric": "top5"}, ValueError, "needs 5 classes, got 4"),
        ([(LOGITS, LABELS)], {"metric": "top3"}, ValueError, "unknown metric 'top3'"),
        ([(LOGITS, LABELS)], {"max_batches": 0}, ValueError, "max_batches must be at least 1"),
    ],
)
def test_bad_input_is_named(batches, options, error, message):
    with pytest.raises(error, match=message):
        evaluate(Fixed(), batches, progress=False, **options)


def test_model_size_is_that_of_parameters_and_buffers():
    model = nn.Sequential(nn.Linear(10, 4), nn.BatchNorm1d(4))
    assert model_size(model) == 4 * (40 + 4 + 4 * 4) + 8


def test_model_size_counts_codes_as_bytes_and_shared_tensors_once():
    model = nn.Module()
    model.register_buffer("codes", torch.zeros(100, dtype=torch.int8))
    model.register_buffer("packed", torch.zeros(30, dtype=torch.uint8))
    model.a = nn.Linear(5, 5, bias=False)
    model.b = nn.Linear(5, 5, bias=False)
    assert model_size(model) == 130 + 200
    model.b.weight = model.a.weight
    assert model_size(model) == 130 + 100


def test_model_size_of_a_scripted_model_is_the_same():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    assert model_size(torch.jit.script(model)) == model_size(model)


def test_nan_outputs_are_an_error():
    with pytest.raises(ValueError, match="NaN"):
        evaluate(
            lambda x: torch.full((2, 10), float("nan")),
            [(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))],
            progress=False,
        )

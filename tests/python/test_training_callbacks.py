"""The schedule as a callback of Hugging Face's Trainer and of Lightning."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from networks import digits, trained
from torch import nn

import qtoolkit as qt

LIGHTNINGS = ["lightning.pytorch", "pytorch_lightning"]


def installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not installed(name), reason=f"{name} is not installed")


def prepared() -> nn.Module:
    return qt.prepare_qat(trained(), example_inputs=(torch.randn(2, 1, 8, 8),))


def state(model: nn.Module) -> tuple[bool, bool, bool]:
    quantizer = model.fc.weight_fake_quant
    return quantizer.observing, quantizer.fake_quantizing, bool(model.bn1.frozen)


SCHEDULE = qt.QATSchedule(start_fake_quant=2, freeze_bn=3, freeze_observers=4)
# (observing, fake_quantizing, batch norm frozen) in steps 0, 1, ...
EXPECTED = [(True, False, False)] * 2 + [(True, True, False), (True, True, True)]
EXPECTED += [(False, True, True)] * 2


class Recording(nn.Module):
    """Notes the state of the model in each step; returns what both trainers want."""

    def __init__(self) -> None:
        super().__init__()
        self.net = prepared()
        self.states: list[tuple[bool, bool, bool]] = []

    def forward(self, x, labels):
        self.states.append(state(self.net))
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@needs("transformers")
@needs("accelerate")
def test_transformers_trainer_follows_the_schedule(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = Recording()
    data = [{"x": x[0], "labels": y[0]} for x, y in digits()[0]]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=len(EXPECTED),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    callback = SCHEDULE.transformers_callback()
    Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    assert model.states == [now for now in EXPECTED for _ in range(2)]


@pytest.mark.parametrize("package", [pytest.param(name, marks=needs(name)) for name in LIGHTNINGS])
def test_lightning_trainer_follows_the_schedule(package, tmp_path):
    pl = importlib.import_module(package)

    class Task(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Recording()

        def training_step(self, batch, index):
            return self.model(*batch)["loss"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-3)

    callback = SCHEDULE.lightning_callback()
    assert isinstance(callback, pl.Callback)
    task = Task()
    trainer = pl.Trainer(
        max_steps=len(EXPECTED),
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(task, torch.utils.data.DataLoader(digits()[0], batch_size=None))
    assert task.model.states == EXPECTED


@needs("transformers")
def test_transformers_callback_resumes_in_the_middle():
    model = prepared()
    SCHEDULE.transformers_callback().on_step_begin(
        None, SimpleNamespace(global_step=3), None, model=model
    )
    assert state(model) == EXPECTED[3]


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    hide(monkeypatch, "transformers")
    with pytest.raises(ImportError, match="pip install transformers"):
        SCHEDULE.transformers_callback()


def test_without_lightning_the_error_says_what_to_install(monkeypatch):
    hide(monkeypatch, "lightning", "lightning.pytorch", "pytorch_lightning")
    with pytest.raises(ImportError, match="pip install lightning"):
        SCHEDULE.lightning_callback()

"""The knowledge distillation loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import qtoolkit as qt


def logits(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_it_is_the_formula():
    student, teacher = logits(5, 7), logits(5, 7, seed=1)
    labels = torch.tensor([0, 6, 3, 3, 1])
    t, alpha = 3.0, 0.7
    total = 0.0
    for s, q, label in zip(student.tolist(), teacher.tolist(), labels.tolist()):
        soft_s = [math.exp(v / t) for v in s]
        soft_q = [math.exp(v / t) for v in q]
        p = [v / sum(soft_q) for v in soft_q]
        kl = sum(a * math.log(a * sum(soft_s) / b) for a, b in zip(p, soft_s))
        hard = -math.log(math.exp(s[label]) / sum(math.exp(v) for v in s))
        total += (alpha * t * t * kl + (1 - alpha) * hard) / 5
    actual = qt.distillation_loss(student, teacher, labels, temperature=t, alpha=alpha)
    assert actual.dtype == torch.float64
    assert float(actual) == pytest.approx(total, rel=1e-12)


def test_the_ends_of_alpha_are_its_two_terms():
    student, teacher, labels = logits(4, 3), logits(4, 3, seed=1), torch.tensor([0, 2, 1, 1])
    soft = qt.distillation_loss(student, teacher)
    assert torch.equal(qt.distillation_loss(student, teacher, labels, alpha=1.0), soft)
    hard = functional.cross_entropy(student, labels)
    assert torch.allclose(qt.distillation_loss(student, teacher, labels, alpha=0.0), hard)
    assert float(qt.distillation_loss(student, student)) == pytest.approx(0, abs=1e-15)


def test_high_temperatures_keep_the_gradient_in_proportion():
    """Hinton et al. 2015, section 2.1: it tends to (z - v) / N for logits of mean zero."""
    student, teacher = logits(1, 6), logits(1, 6, seed=1)
    student = (student - student.mean()).requires_grad_()
    teacher = teacher - teacher.mean()
    qt.distillation_loss(student, teacher, temperature=1e4).backward()
    assert torch.allclose(student.grad, (student.detach() - teacher) / 6, atol=1e-3)


def test_only_the_student_gets_a_gradient():
    student, teacher = logits(2, 3).requires_grad_(), logits(2, 3, seed=1).requires_grad_()
    qt.distillation_loss(student, teacher, torch.tensor([0, 1])).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_ignored_positions_of_a_sequence_count_in_neither_term():
    student, teacher = logits(2, 4, 5), logits(2, 4, 5, seed=1)
    labels = torch.tensor([[1, 2, -100, -100], [0, -100, 4, 3]])
    kept = labels != -100
    expected = qt.distillation_loss(student[kept], teacher[kept], labels[kept])
    assert torch.allclose(qt.distillation_loss(student, teacher, labels), expected)


def test_sixteen_bit_logits_are_taken_as_float32():
    student, teacher = logits(4, 9).bfloat16(), logits(4, 9, seed=1).bfloat16()
    actual = qt.distillation_loss(student, teacher)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, qt.distillation_loss(student.float(), teacher.float()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"teacher_logits": logits(4, 4)}, ValueError, r"one shape .* got \(4, 3\) and \(4, 4\)"),
        ({"temperature": 0.0}, ValueError, "temperature must be above 0, got 0.0"),
        ({"alpha": 1.5}, ValueError, "alpha must be from 0 to 1, got 1.5"),
        ({"labels": torch.zeros(4)}, TypeError, "labels must be class indices, got torch.float32"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, r"labels of shape \(3,\)"),
        ({"student_logits": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "floating point"),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"student_logits": logits(4, 3), "teacher_logits": logits(4, 3)} | change
    with pytest.raises(error, match=message):
        qt.distillation_loss(**arguments)


def test_classes_of_segmentation_are_dimension_1():
    student, teacher = logits(2, 3, 4, 5), logits(2, 3, 4, 5, seed=1)
    labels = torch.arange(40).reshape(2, 4, 5) % 3
    last = (student.movedim(1, -1), teacher.movedim(1, -1), labels)
    actual = qt.distillation_loss(student, teacher, labels, dim=1)
    assert torch.equal(actual, qt.distillation_loss(*last))
    with pytest.raises(ValueError, match=r"logits of shape \(2, 3, 4, 5\) .*pass dim=1"):
        qt.distillation_loss(student, teacher, labels)

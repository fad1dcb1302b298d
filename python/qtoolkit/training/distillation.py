"""Training with the outputs of another model as targets."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    temperature: float = 4.0,
    alpha: float = 0.9,
    *,
    ignore_index: int = -100,
    dim: int = -1,
) -> Tensor:
    """Knowledge distillation: the student learns the teacher's probabilities.

    ``alpha * T^2 * KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) *
    cross_entropy(student, labels)``, averaged over all positions; the factor T^2 keeps the
    gradients of both terms in proportion when the temperature T changes. In quantization-aware
    training the float model is the usual teacher.

    Args:
        student_logits: floating point, [..., classes].
        teacher_logits: the same shape; no gradient goes there.
        labels: int64, the logits' shape without classes; without labels the result is the first
            term alone, without alpha.
        temperature: T, above 0; softens both distributions.
        alpha: weight of the teacher, from 0 to 1.
        ignore_index: positions with this label count in neither term.
        dim: the axis of the classes; 1 for segmentation, [batch, classes, height, width].

    Returns:
        0-dim float32 (float64 for float64 logits): probabilities of 16-bit logits are computed in
        float32.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015,
    section 2.
    """
    if student_logits.shape != teacher_logits.shape or student_logits.dim() == 0:
        raise ValueError(
            "distillation_loss: student and teacher logits must have one shape [..., classes], got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"distillation_loss: temperature must be above 0, got {temperature}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"distillation_loss: alpha must be from 0 to 1, got {alpha}")
    student_logits, teacher_logits = (
        student_logits.movedim(dim, -1),
        teacher_logits.movedim(dim, -1),
    )
    classes = student_logits.shape[-1]
    student = _at_least_float32(student_logits).reshape(-1, classes)
    teacher = _at_least_float32(teacher_logits.detach()).reshape(-1, classes)
    divergence = functional.kl_div(
        functional.log_softmax(student / temperature, dim=-1),
        functional.log_softmax(teacher / temperature, dim=-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    if labels is None:
        return temperature**2 * divergence.mean()
    if labels.is_floating_point():
        raise TypeError(f"distillation_loss: labels must be class indices, got {labels.dtype}")
    if labels.shape != student_logits.shape[:-1]:
        shape = student_logits.movedim(-1, dim).shape
        hint = "; pass dim=1" if labels.shape == shape[:1] + shape[2:] else ""
        raise ValueError(
            f"distillation_loss: labels of shape {tuple(labels.shape)} do not fit logits of shape "
            f"{tuple(shape)} with classes in dimension {dim}{hint}"
        )
    labels = labels.reshape(-1)
    counted = labels != ignore_index
    soft = torch.where(counted, divergence, 0).sum() / counted.sum()
    hard = functional.cross_entropy(student, labels, ignore_index=ignore_index)
    return alpha * temperature**2 * soft + (1 - alpha) * hard


def _at_least_float32(logits: Tensor) -> Tensor:
    if not logits.is_floating_point():
        raise TypeError(f"distillation_loss: logits must be floating point, got {logits.dtype}")
    return logits if logits.dtype == torch.float64 else logits.float()

"""Scales that are fitted to outputs, once codes are chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit.weight_only.grid import Coded, grouped

# Share of the mean of the Hessian's diagonal that is added to it, as in GPTQ: data that has a few
# directions alone would fit those and nothing else.
_DAMPING = 0.01


def fit_scales(coded: Coded, weight: Tensor, hessian: Tensor) -> None:
    """Gives the groups of each row the scales of least squared output error for their codes.

    All groups of a row together: the error of one may undo that of another. A row keeps its scales
    where one of the new ones would not be positive. Does nothing to formats whose scales have a
    format of their own.

    Args:
        coded: is changed.
        weight: float32 ``[N, K]``, what it stands for.
        hessian: float32 ``[K, K]``, the mean of ``x x^T`` over the inputs.
    """
    grid = coded.grid
    if grid.format.block_size:
        return
    size, (rows, columns) = grid.group_size, weight.shape
    groups = coded.scale.size(1)
    zero = coded.zero_point
    spread = None if zero is None else zero.repeat_interleave(size, 1)[:, :columns]
    levels = grid.levels(coded.codes.float(), spread)
    diagonal = hessian.diagonal()
    damped = hessian + torch.diag((diagonal.mean() * _DAMPING).expand_as(diagonal))
    left = torch.empty(rows, groups, groups, dtype=torch.float64, device=weight.device)
    right = torch.empty(rows, groups, dtype=torch.float64, device=weight.device)
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        seen = levels[:, part] @ damped[part]
        products = grouped(seen * levels, size)
        left[:, g] = products.sum(1, dtype=torch.float64).reshape(rows, groups)
        right[:, g] = (seen * weight).sum(1, dtype=torch.float64)
    # In units of what each group adds alone, so that the systems are of one size.
    unit = left.diagonal(dim1=1, dim2=2).sqrt().clamp(min=1e-30)
    left /= unit[:, :, None] * unit[:, None]
    left += torch.eye(groups, dtype=left.dtype, device=left.device) * 1e-9
    found, info = torch.linalg.solve_ex(left, right / unit)
    scale = (found / unit).float()
    good = (info == 0) & (torch.isfinite(scale) & (scale > 0)).all(1)
    coded.scale = torch.where(good[:, None], scale, coded.scale)

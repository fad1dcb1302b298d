"""GPTQ and AWQ of several processes, each with its share of the data: one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn
from weight_only_models import decoder, tokens

import qtoolkit as qt


def quantized(rank: int, method: str, folder: str | None) -> dict[str, Tensor]:
    share = tokens()[rank::2]
    # The second rank has more batches than the first.
    data = share + share[:1] if rank == 1 else share
    model = qt.quantize_weights(
        decoder(), "int4", 16, method, data, progress=False,
        resume=None if folder is None else f"{folder}/{rank}",
    )  # fmt: skip
    return dict(model.state_dict())


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_all_ranks_get_the_model_of_all_data(method):
    first, second = on_ranks(quantized, method, None)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    batches = [*tokens()[::2], *tokens()[1::2], tokens()[1]]
    alone = qt.quantize_weights(decoder(), "int4", 16, method, batches, progress=False)
    own = dict(alone.state_dict())
    for name, tensor in own.items():
        if name.endswith("codes"):
            assert float((tensor == first[name]).float().mean()) > 0.98, name
    half = qt.quantize_weights(decoder(), "int4", 16, method, tokens()[::2], progress=False)
    assert any(not torch.equal(half.state_dict()[name], first[name]) for name in own)


def resumed(rank: int, folder: str) -> Any:
    if rank == 0:  # the other one has only half of its layers to go on from
        for file in list(Path(folder, "1").glob("*.safetensors"))[::2]:
            file.unlink()
    torch.distributed.barrier()
    return quantized(rank, "gptq", folder)


def test_a_run_goes_on_where_all_ranks_are(tmp_path):
    first, _ = on_ranks(quantized, "gptq", str(tmp_path))
    for again in on_ranks(resumed, str(tmp_path)):
        assert all(torch.equal(first[name], again[name]) for name in first)


class Branching(nn.Module):
    """Reads another layer where the input is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if float(x.detach().sum()) > 0 else self.b(x)


def failing(rank: int, kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "branch":
        x = torch.ones(4, 16) * (1 if rank == 0 else -1)
        return qt.quantize_weights(Branching(), "int4", 16, "gptq", [x], progress=False)
    x = torch.ones(4, 16)
    if rank == 1:
        x[0, 0] = torch.nan
    return qt.quantize_weights(nn.Linear(16, 16), "int4", 16, "gptq", [x], progress=False)


def test_what_one_rank_meets_all_are_told():
    for error in on_ranks(failing, "branch"):
        assert "data of rank 1 reaches other layers" in str(error)
    first, second = on_ranks(failing, "nan")
    assert "holds NaN or Inf" in str(second)
    assert "failed on rank 1" in str(first)

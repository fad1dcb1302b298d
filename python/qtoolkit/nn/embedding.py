"""Embedding tables of 8-bit codes, each row with a range of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from qtoolkit.nn.base import QuantizedModule, saved


def _quantize_rows(weight: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (uint8), scale and least value (float32) of each row: ``code * scale + low``."""
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{name}.weight holds NaN or Inf; check the model's checkpoint")
    weight = weight.detach().float()
    low, high = weight.amin(1), weight.amax(1)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = torch.round((weight - low[:, None]) / scale[:, None]).clamp(0, 255)
    return codes.to(torch.uint8), scale, low


@saved(weight=torch.uint8, weight_scale=torch.float32, weight_low=torch.float32)
class Embedding(QuantizedModule):
    """``nn.Embedding`` whose rows are 8-bit codes: ``code * scale + low``. On any device.

    Attributes:
        weight: uint8 ``[rows, width]``.
        weight_scale, weight_low: float32 ``[rows]``.
    """

    def __init__(self, weight: Tensor, scale: Tensor, low: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_low", low)

    @classmethod
    def from_float(cls, embedding: nn.Embedding, *, name: str = "embedding") -> Embedding:
        """The table for a float one, which is not changed.

        Raises:
            TypeError: it is no ``nn.Embedding``.
            ValueError: a value is NaN or infinite.
        """
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(f"{name} must be a torch.nn.Embedding, got {type(embedding).__name__}")
        return cls(*_quantize_rows(embedding.weight, name))

    def rows(self, indices: Tensor) -> Tensor:
        """The float rows ``[len(indices), width]`` of indices in one dimension."""
        codes = self.weight.index_select(0, indices).float()
        scale = self.weight_scale.index_select(0, indices).unsqueeze(1)
        return codes * scale + self.weight_low.index_select(0, indices).unsqueeze(1)

    def forward(self, input: Tensor) -> Tensor:
        shape = input.shape + (self.weight.size(1),)  # noqa: RUF005  (TorchScript has no *)
        return self.rows(input.reshape(-1)).reshape(shape)

    @property
    def num_embeddings(self) -> int:
        """Number of rows."""
        return int(self.weight.size(0))

    @property
    def embedding_dim(self) -> int:
        """Length of a row."""
        return int(self.weight.size(1))

    def formats(self) -> str:
        return "uint8 -> float32"

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


@saved(
    mode=str,
    include_last_offset=bool,
    weight=torch.uint8,
    weight_scale=torch.float32,
    weight_low=torch.float32,
)
class EmbeddingBag(Embedding):
    """``nn.EmbeddingBag`` whose rows are 8-bit codes; see ``Embedding``.

    Args:
        mode: ``"sum"``, ``"mean"`` or ``"max"``.
        include_last_offset: whether the offsets end with the number of indices.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        low: Tensor,
        *,
        mode: str = "mean",
        include_last_offset: bool = False,
    ) -> None:
        super().__init__(weight, scale, low)
        self.mode = mode
        self.include_last_offset = include_last_offset

    @classmethod
    def from_float(cls, embedding: nn.Module, *, name: str = "embedding") -> EmbeddingBag:
        """The table for a float one, which is not changed.

        Raises:
            TypeError: it is no ``nn.EmbeddingBag``.
            ValueError: a value is NaN or infinite.
        """
        if not isinstance(embedding, nn.EmbeddingBag):
            raise TypeError(
                f"{name} must be a torch.nn.EmbeddingBag, got {type(embedding).__name__}"
            )
        return cls(
            *_quantize_rows(embedding.weight, name),
            mode=embedding.mode,
            include_last_offset=embedding.include_last_offset,
        )

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        # The rows in the order in which they are wanted are a table of their own.
        order = torch.arange(input.numel(), device=input.device).reshape(input.shape)
        return functional.embedding_bag(
            order,
            self.rows(input.reshape(-1)),
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
        )

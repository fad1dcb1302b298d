"""Small models of which weights become codes, and inputs for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Attention and a gated MLP after norms, as in Llama."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.gate = (nn.Linear(width, 2 * width) for _ in range(2))
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """A small language model; its head shares the embedding's weight where asked."""

    def __init__(self, words: int = 32, width: int = 32, blocks: int = 2, tied: bool = False):
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(blocks)])
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def decoder(seed: int = 0, **options: object) -> Decoder:
    torch.manual_seed(seed)
    model = Decoder(**options).eval()
    for module in model.modules():  # norms of ones would hide mistakes
        if isinstance(module, nn.RMSNorm | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.2, 2.0)
    return model


def tokens(batches: int = 4, rows: int = 4, length: int = 24, words: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(words, (rows, length), generator=generator) for _ in range(batches)]

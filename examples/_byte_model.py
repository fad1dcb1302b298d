"""A small language model over bytes, and Python's own standard library as its text."""

from __future__ import annotations

import ast
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

Cache = list[tuple[Tensor, Tensor]]


def standard_library(limit: int) -> tuple[Tensor, Tensor]:
    """The bytes of Python's standard library for training and, of other files, for evaluation;
    uint8, at most `limit` and a tenth of it."""
    root = Path(ast.__file__).parent
    files = sorted(f for f in root.rglob("*.py") if not {"site-packages", "test"} & set(f.parts))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for i, file in enumerate(files):
        parts[i % 10 == 9].append(file.read_bytes())
    train, test = (torch.frombuffer(bytearray(b"".join(p)), dtype=torch.uint8) for p in parts)
    return train[:limit], test[: limit // 10]


class Block(nn.Module):
    """Causal attention with rotary positions and a gated MLP, as in Llama."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.gate = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, turns: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple:
        y = self.norm1(x)
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        q, k = turned(q, turns), turned(k, turns)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) > 1)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y)), (k, v)


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary positions; turns: [2, length, half] cosines and sines."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * turns[0] - b * turns[1], a * turns[1] + b * turns[0]), -1)


class ByteModel(nn.Module):
    """Logits of the next byte, [batch, length, 256]."""

    def __init__(
        self, width: int = 256, hidden: int = 640, blocks: int = 3, heads: int = 4
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.ModuleList([Block(width, hidden, heads) for _ in range(blocks)])
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        half = width // heads // 2
        frequencies = 10000.0 ** (-torch.arange(half) / half)
        angles = torch.arange(4096)[:, None] * frequencies
        self.register_buffer("turns", torch.stack((angles.cos(), angles.sin())), persistent=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.step(tokens, None)[0]

    def step(self, tokens: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """Logits, and the keys and values so far."""
        x = self.embedding(tokens.long())
        begin = 0 if cache is None else cache[0][0].size(2)
        turns = self.turns[:, begin : begin + tokens.size(1)]
        kept = []
        for i, block in enumerate(self.blocks):
            # Positional and the same for all blocks without a cache, so that calibration can run
            # them one by one.
            x, pair = block(x, turns, None if cache is None else cache[i])
            kept.append(pair)
        return self.head(self.norm(x)), kept


def train(
    model: nn.Module,
    text: Tensor,
    steps: int | None,
    minutes: float,
    *,
    rows: int = 16,
    length: int = 256,
    seed: int = 0,
) -> int:
    """AdamW with warm-up and a cosine, products in bfloat16.

    Takes `steps`, or, if that is None, as many as fit in some minutes; returns how many it took.
    """
    warm_up = 50
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    start = time.perf_counter()
    step, done = 0, 0.0
    while done < 1:
        rate = min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = 3e-3 * rate
        begins = torch.randint(len(text) - length - 1, (rows,), generator=generator)
        batch = torch.stack([text[b : b + length + 1] for b in begins.tolist()]).long()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        seconds = time.perf_counter() - start
        done = step / steps if steps is not None else seconds / (60 * minutes)
        if step % 50 == 0 or done >= 1:
            print(f"step {step}, {100 * done:.0f} %: loss {loss:.3f}, {seconds:.0f} s", flush=True)
    return step


def generate(model: ByteModel, prompt: Tensor, count: int) -> Tensor:
    """The likeliest bytes after a prompt [length], one by one; with the prompt."""
    tokens = prompt[None].long()
    logits, cache = model.step(tokens, None)
    result = [prompt.long()]
    for _ in range(count):
        token = logits[:, -1].argmax(-1)
        result.append(token)
        logits, cache = model.step(token[None], cache)
    return torch.cat(result)

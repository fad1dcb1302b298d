"""A diffusion transformer with weights of 4 bits: the error of its noise, its size, its samples.

A small DiT of the diffusers library learns in about a minute to tell the noise in images of
handwritten digits; then each of the methods makes int4 weights of it.

    python examples/dit_int4.py
    python examples/dit_int4.py --format int3 --methods rtn gptq

Needs diffusers and scikit-learn: pip install diffusers scikit-learn
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import qtoolkit as qt

METHODS = ("rtn", "hqq", "awq", "gptq")
#: Steps of the noise.
TIMES = 1000


def small_dit(width: int, blocks: int) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=max(1, width // 32), attention_head_dim=32, in_channels=1,
        out_channels=1, num_layers=blocks, sample_size=8, patch_size=2, num_embeds_ada_norm=TIMES,
    )  # fmt: skip


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [count, 1, 8, 8] in [-1, 1] and their classes, for training and test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target)
    return images[:1500], labels[:1500], images[1500:], labels[1500:]


def kept_share(times: Tensor) -> Tensor:
    """How much of the variance at a time is the image's: a cosine."""
    return torch.cos((times + 1) / (TIMES + 1) * torch.pi / 2).square()


def noisy(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images with noise of random times, the times, and the noise."""
    times = torch.randint(TIMES, (len(images),), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    share = kept_share(times)[:, None, None, None]
    return share.sqrt() * images + (1 - share).sqrt() * noise, times, noise


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min((step + 1) / 20, 1 - step / steps)
        chosen = torch.randint(len(images), (64,), generator=generator)
        x, times, noise = noisy(images[chosen], generator)
        found = model(x, timestep=times, class_labels=labels[chosen]).sample
        loss = functional.mse_loss(found, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} of {steps}: loss {loss:.3f}", flush=True)
    model.eval()


@torch.no_grad()
def sample(model: nn.Module, labels: Tensor, steps: int) -> Tensor:
    """Images of those classes, by deterministic steps (DDIM) from the same noise each time."""
    x = torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(0))
    times = torch.linspace(TIMES - 1, 0, steps).long()
    for i, time in enumerate(times):
        noise = model(x, timestep=time.expand(len(labels)), class_labels=labels).sample
        share = kept_share(time)
        image = ((x - (1 - share).sqrt() * noise) / share.sqrt()).clamp(-1, 1)
        after = kept_share(times[i + 1]) if i + 1 < steps else torch.tensor(1.0)
        noise = (x - share.sqrt() * image) / (1 - share).sqrt()
        x = after.sqrt() * image + (1 - after).sqrt() * noise
    return x


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--format", default="int4")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=600, help="of training")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--json", help="file for the results")
    arguments = parser.parse_args(argv)
    try:
        import diffusers  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise SystemExit(
            f"this example needs two packages ({error}): pip install diffusers scikit-learn"
        ) from None

    model = small_dit(arguments.width, arguments.blocks)
    images, labels, test_images, test_labels = digits()
    train(model, images, labels, arguments.steps)

    generator = torch.Generator().manual_seed(1)
    data = []
    for begin in range(0, 512, 64):
        x, times, _ = noisy(images[begin : begin + 64], generator)
        data.append({"hidden_states": x, "timestep": times,
                     "class_labels": labels[begin : begin + 64]})  # fmt: skip
    x, times, noise = noisy(test_images, generator)
    classes = torch.arange(10)
    drawn = sample(model, classes, 20)

    @torch.no_grad()
    def told(m: nn.Module) -> Tensor:
        return m(x, timestep=times, class_labels=test_labels).sample

    expected = told(model)
    rows = []

    def add(method: str, m: nn.Module) -> None:
        found = told(m)
        error = functional.mse_loss(found, expected)
        row = {
            "method": method,
            "loss": float(functional.mse_loss(found, noise)),
            "sqnr_db": float(10 * torch.log10(expected.square().mean() / error)),
            "sample_error": float((sample(m, classes, 20) - drawn).square().mean().sqrt()),
            "megabytes": qt.model_size(m) / 1e6,
        }
        rows.append(row)
        print(
            f"{method:8} loss {row['loss']:.4f}, noise within {row['sqnr_db']:6.1f} dB, samples "
            f"differ by {row['sample_error']:.4f} (of 2), {row['megabytes']:.2f} MB",
            flush=True,
        )

    add("float32", model)
    for method in arguments.methods:
        add(
            method,
            qt.quantize_weights(
                model, arguments.format, arguments.group_size, method, data, progress=False
            ),
        )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"format": arguments.format, "rows": rows}))
    return rows


if __name__ == "__main__":
    main()

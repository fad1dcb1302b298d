"""Dynamic int8 of an encoder: accuracy, size and latency beside the float model.

A small encoder of the shape of BERT learns, in a few minutes, from which package of Python's own
standard library a piece of text is. Then its linear layers get int8 weights, and round each row of
their input as it comes: no calibration data, no tracing.

    python examples/bert_dynamic.py
    python examples/bert_dynamic.py --model PATH      # a local Hugging Face folder of a classifier

With --model nothing is trained or downloaded: its own tokenizer reads the same texts, and accuracy
is how often both models choose the same class. Needs transformers: pip install transformers
"""

from __future__ import annotations

import argparse
import ast
import json
from pathlib import Path
from typing import Any

import torch
from _common import medians, time_interleaved
from torch import Tensor, nn
from torch.nn import functional

import qtoolkit as qt

PACKAGES = ("asyncio", "email", "unittest", "xml")


def texts(length: int) -> tuple[list[tuple[bytes, int]], list[tuple[bytes, int]]]:
    """Pieces of the packages' files with the number of their package, for training and test, which
    are of different files."""
    parts: tuple[list[tuple[bytes, int]], list[tuple[bytes, int]]] = ([], [])
    for label, package in enumerate(PACKAGES):
        files = sorted((Path(ast.__file__).parent / package).rglob("*.py"))
        for i, file in enumerate(files):
            text = file.read_bytes()
            pieces = [text[b : b + length] for b in range(0, len(text) - length + 1, length)]
            parts[i % 4 == 3].extend((piece, label) for piece in pieces)
    return parts


def as_bytes(pieces: list[tuple[bytes, int]]) -> tuple[Tensor, Tensor]:
    """Tokens [pieces, length], one a byte, and labels [pieces]."""
    tokens = torch.tensor([list(text) for text, _ in pieces])
    return tokens, torch.tensor([label for _, label in pieces])


def small_encoder(arguments: argparse.Namespace) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    width = arguments.width
    config = BertConfig(
        vocab_size=256, hidden_size=width, intermediate_size=4 * width, num_labels=len(PACKAGES),
        num_hidden_layers=arguments.blocks, num_attention_heads=max(1, width // 64),
        max_position_embeddings=arguments.length,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def train(model: nn.Module, tokens: Tensor, labels: Tensor, steps: int) -> None:
    """AdamW over random batches of 32, each class alike."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.01)
    share = 1 / torch.bincount(labels)[labels]
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-4 * min((step + 1) / 20, 1 - step / steps)
        chosen = torch.multinomial(share, 32, replacement=True, generator=generator)
        loss = functional.cross_entropy(model(tokens[chosen]).logits, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} of {steps}: loss {loss:.3f}", flush=True)
    model.eval()


@torch.no_grad()
def choices(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """The class that the model chooses for each text."""
    return torch.cat([model(**batch).logits.argmax(-1) for batch in batches])


def local_classifier(path: str, pieces: list[tuple[bytes, int]]) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(path, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    words = [text.decode("utf-8", "replace") for text, _ in pieces]
    batches = [
        dict(tokenizer(words[i : i + 16], return_tensors="pt", padding=True, truncation=True))
        for i in range(0, len(words), 16)
    ]
    return model, batches


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a local Hugging Face folder, instead of the small encoder")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="bytes of a text")
    parser.add_argument("--test", type=int, default=1000, help="texts")
    parser.add_argument("--rounds", type=int, default=15, help="of timing")
    parser.add_argument("--json", help="file for the results")
    arguments = parser.parse_args(argv)
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise SystemExit("this example needs transformers: pip install transformers") from None

    learned, tested = texts(arguments.length)
    tested = tested[:: max(1, len(tested) // arguments.test)]
    labels: Tensor | None = None
    if arguments.model:
        model, batches = local_classifier(arguments.model, tested)
    else:
        model = small_encoder(arguments)
        train(model, *as_bytes(learned), arguments.steps)
        tokens, labels = as_bytes(tested)
        batches = [{"input_ids": part} for part in tokens.split(16)]

    quantized = qt.quantize_dynamic(model)
    expected = choices(model, batches)
    models = {"float32": model, "dynamic int8": quantized}
    one = {key: tensor[:1] for key, tensor in batches[0].items()}
    with torch.no_grad():
        times = {
            size: medians(
                time_interleaved(
                    {name: lambda m=m, b=b: m(**b) for name, m in models.items()}, arguments.rounds
                )
            )
            for size, b in ((1, one), (len(next(iter(batches[0].values()))), batches[0]))
        }
    rows = []
    for name, m in models.items():
        found = choices(m, batches)
        row = {
            "model": name,
            "accuracy": None if labels is None else 100 * float((found == labels).float().mean()),
            "agreement": 100 * float((found == expected).float().mean()),
            "megabytes": qt.model_size(m) / 1e6,
            "milliseconds": {size: known[name] for size, known in times.items()},
            "of_float": {size: known[name] / known["float32"] for size, known in times.items()},
        }
        rows.append(row)
        right = "" if labels is None else f"accuracy {row['accuracy']:5.1f} %, "
        speed = ", ".join(
            f"batch {size}: {row['milliseconds'][size]:.2f} ms ({ratio:.2f} of float)"
            for size, ratio in row["of_float"].items()
        )
        print(
            f"{name:12} {right}same choice {row['agreement']:5.1f} %, {row['megabytes']:.2f} MB; "
            f"{speed}"
        )
    result = {"threads": torch.get_num_threads(), "texts": len(expected), "rows": rows}
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()

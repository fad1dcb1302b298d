"""A language model in every weight format, by every method: perplexity, size, tokens a second.

A small byte-level transformer is trained on the source of Python's own standard library, in a few
minutes on two cores; ``--weights FILE`` keeps its weights for the next run. Then

    python examples/llm_int4.py                                   # all formats and methods
    python examples/llm_int4.py --formats int4 int3 --methods rtn gptq
    python examples/llm_int4.py --model PATH                      # a local Hugging Face folder

With --model the folder's own tokenizer reads the same text; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
from _byte_model import ByteModel, generate, standard_library, train
from torch import Tensor, nn
from torch.nn import functional

import qtoolkit as qt

FORMATS = ["int8", "int6", "int5", "int4", "int3", "int2", "ternary", "binary"]
FORMATS += ["nf4", "fp8", "mxfp4", "nvfp4"]
METHODS = ["rtn", "hqq", "awq", "gptq"]
#: By how much the perplexity may rise at most, in per cent.
LIMITS = {("int8", m): 0.5 for m in METHODS} | {
    ("int4", "gptq"): 2.0, ("int4", "awq"): 2.0, ("int3", "gptq"): 8.0, ("int3", "awq"): 8.0,
}  # fmt: skip


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    output = model(tokens)
    return output if isinstance(output, Tensor) else output.logits


@torch.no_grad()
def perplexity(
    model: nn.Module, windows: Tensor, reference: nn.Module | None = None
) -> tuple[float, float | None]:
    """exp of the mean loss of all but the first token of each window [windows, length], and the
    mean divergence (Kullback-Leibler) of the predictions from those of a reference, in 1e-3 nats:
    what quantization changes, where the loss may also fall by luck."""
    total, apart, count = 0.0, 0.0, 0
    for rows in windows.split(8):
        found = logits_of(model, rows[:, :-1]).float().log_softmax(-1).flatten(0, 1)
        total += float(functional.nll_loss(found, rows[:, 1:].flatten())) * rows.size(0)
        if reference is not None:
            wanted = logits_of(reference, rows[:, :-1]).float().log_softmax(-1).flatten(0, 1)
            mean = functional.kl_div(found, wanted, reduction="batchmean", log_target=True)
            apart += float(mean) * rows.size(0)
        count += rows.size(0)
    return math.exp(total / count), None if reference is None else 1e3 * apart / count


@torch.no_grad()
def tokens_per_second(model: nn.Module, prompt: Tensor, count: int) -> float:
    def run() -> None:
        if isinstance(model, ByteModel):
            generate(model, prompt, count)
        else:
            model.generate(prompt[None], max_new_tokens=count, min_new_tokens=count)

    run()
    start = time.perf_counter()
    run()
    return count / (time.perf_counter() - start)


def byte_model(arguments: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor]:
    """A trained model, and windows for calibration and evaluation."""
    train_text, test_text = standard_library(arguments.bytes)
    torch.manual_seed(arguments.seed)
    model = ByteModel(arguments.width, arguments.width * 5 // 2, arguments.blocks)
    kept = Path(arguments.weights) if arguments.weights else None
    if kept is not None and kept.is_file():
        model.load_state_dict(torch.load(kept, weights_only=True))
    else:
        train(model, train_text, arguments.steps, arguments.minutes, seed=arguments.seed)
        if kept is not None:
            torch.save(model.state_dict(), kept)
    return model.eval(), train_text.long(), test_text.long()


def local_model(path: str, limit: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A model of a Hugging Face folder, and the text in its tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    texts = (bytes(t.tolist()).decode("utf-8", "replace") for t in standard_library(limit))
    train_text, test_text = (
        tokenizer(text, return_tensors="pt", verbose=False).input_ids[0] for text in texts
    )
    return model, train_text, test_text


def windows_of(text: Tensor, count: int, length: int) -> Tensor:
    """Pieces of a text, evenly spread, [count, length]."""
    count = min(count, len(text) // length)
    begins = torch.linspace(0, len(text) - length, count).long()
    return torch.stack([text[b : b + length] for b in begins.tolist()])


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a local Hugging Face folder, instead of the byte model")
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--accumulate", default="float32", choices=["float32", "int8"])
    parser.add_argument("--minutes", type=float, default=3.0, help="of training")
    parser.add_argument("--steps", type=int, help="of training, instead of minutes")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the training")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--bytes", type=int, default=8_000_000, help="of text for training")
    parser.add_argument("--weights", help="file that keeps the trained weights")
    parser.add_argument("--calibration", type=int, default=64, help="windows")
    parser.add_argument("--evaluation", type=int, default=400, help="windows")
    parser.add_argument("--length", type=int, default=256, help="of a window")
    parser.add_argument("--generate", type=int, default=64, help="tokens, for the speed")
    parser.add_argument("--json", help="file for the results")
    arguments = parser.parse_args(argv)

    if arguments.model:
        model, train_text, test_text = local_model(arguments.model, arguments.bytes)
    else:
        model, train_text, test_text = byte_model(arguments)
    calibration = windows_of(train_text, arguments.calibration, arguments.length)
    evaluation = windows_of(test_text, arguments.evaluation, arguments.length + 1)
    data = list(calibration.split(8))
    prompt = calibration[0, :32]

    base, _ = perplexity(model, evaluation)
    rows = []

    def add(name: str, method: str, quantized: nn.Module, seconds: float) -> None:
        found, apart = base, 0.0
        if quantized is not model:
            found, apart = perplexity(quantized, evaluation, model)
        row = {
            "format": name,
            "method": method,
            "perplexity": round(found, 5),
            "rise_percent": round(100 * (found / base - 1), 3),
            "divergence": round(apart, 4),
            "megabytes": round(qt.model_size(quantized) / 1e6, 3),
            "tokens_per_second": round(tokens_per_second(quantized, prompt, arguments.generate), 1),
            "seconds": round(seconds, 1),
        }
        limit = LIMITS.get((name, method))
        row["within_limit"] = None if limit is None else row["rise_percent"] <= limit
        rows.append(row)
        mark = "" if limit is None else f"  (at most {limit} %: {row['within_limit']})"
        print(
            f"{name:8} {method:5} {row['perplexity']:9.4f} {row['rise_percent']:+8.2f} % "
            f"{row['divergence']:9.3f} mnat "
            f"{row['megabytes']:8.2f} MB {row['tokens_per_second']:8.1f} tokens/s "
            f"{row['seconds']:6.1f} s{mark}",
            flush=True,
        )

    add("float32", "", model, 0.0)
    for name in arguments.formats:
        size = None if name in ("mxfp4", "nvfp4") else arguments.group_size
        for method in arguments.methods:
            start = time.perf_counter()
            quantized = qt.quantize_weights(
                model, name, size, method, data, accumulate=arguments.accumulate, progress=False
            )
            add(name, method, quantized, time.perf_counter() - start)
    if arguments.json:
        settings = {k: v for k, v in vars(arguments).items() if k not in ("json", "weights")}
        result = {
            "torch": torch.__version__.split("+")[0],
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "settings": settings,
            "rows": rows,
        }
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()

"""A Llama-shaped model of 1.1 billion weights, quantized from its shards: seconds, memory, text.

    python benchmarks/llm_streaming.py
    python benchmarks/llm_streaming.py --format int4 --method hqq --threads 1

The model has the shape of TinyLlama-1.1B and random weights, which are written as safetensors
shards first. A new process makes it without memory, quantizes it from the shards and generates; its
peak resident memory, libraries included, is what the kernel says of it (``ru_maxrss``).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _bench import describe, facts, write_json
from torch import nn

import qtoolkit as qt
from qtoolkit.weight_only import skeleton

SHAPES: dict[str, dict[str, int]] = {
    "1.1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 5632,
        "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 160,
        "vocab_size": 256,
    },
}
#: What the 1.1b model may take: seconds, and bytes above the quantized model.
SECONDS, BYTES = 60, 3_000_000_000


def make_model(shape: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SHAPES[shape], tie_word_embeddings=False))


def write_shards(shape: str, dtype: torch.dtype, folder: Path) -> int:
    """Writes the model block by block; returns the number of its weights."""
    from safetensors.torch import save_file

    with skeleton():
        model = make_model(shape)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in model.named_parameters():
        parts = name.split(".")
        shard = parts[2] if parts[1] == "layers" else "rest"
        shards.setdefault(shard, {})[name] = tensor
    index = {}
    generator = torch.Generator().manual_seed(0)
    for shard, tensors in shards.items():
        file = f"model-{shard}.safetensors"
        made = {}
        for name, tensor in tensors.items():
            made[name] = torch.ones(tensor.shape, dtype=dtype)
            if "norm" not in name:
                made[name].normal_(0, 0.02, generator=generator)
        save_file(made, folder / file)
        index.update(dict.fromkeys(tensors, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return sum(p.numel() for p in model.parameters())


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def stream(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    """What a process that does nothing else measures."""
    torch.set_num_threads(arguments.threads)
    torch.set_default_dtype(getattr(torch, arguments.dtype))
    with skeleton():
        model = make_model(arguments.shape)
    torch.set_default_dtype(torch.float32)
    libraries = peak_bytes()
    start = time.perf_counter()
    quantized = qt.quantize_weights(
        model, arguments.format, method=arguments.method, checkpoint=folder, progress=False
    )
    seconds = time.perf_counter() - start
    peak = peak_bytes()
    size = qt.model_size(quantized)
    prompt = torch.arange(8)[None]
    start = time.perf_counter()
    tokens: Any = quantized.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
        max_new_tokens=arguments.generate, min_new_tokens=arguments.generate, pad_token_id=0,
    )  # fmt: skip
    return {
        "seconds": seconds,
        "model_bytes": size,
        "peak_bytes": peak,
        "above_model_bytes": peak - size,
        "libraries_bytes": libraries,
        "generated": int(tokens.size(1) - prompt.size(1)),
        "seconds_a_token": (time.perf_counter() - start) / arguments.generate,
        "peak_bytes_generating": peak_bytes(),
    }


def table(result: dict[str, Any]) -> str:
    rows = [
        ("weights", f"{result['weights'] / 1e9:.2f} billion, {result['dtype']} in files"),
        ("quantizing", f"{result['seconds']:.1f} s"),
        ("the quantized model", f"{result['model_bytes'] / 1e9:.2f} GB"),
        ("peak memory above it", f"{result['above_model_bytes'] / 1e9:.2f} GB"),
        ("of that, Python and libraries", f"{result['libraries_bytes'] / 1e9:.2f} GB"),
        ("`generate()`", f"{result['generated']} tokens, {result['seconds_a_token']:.2f} s each"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="1.1b", choices=SHAPES)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--format", default="int4")
    parser.add_argument("--method", default="rtn", choices=["rtn", "hqq"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--generate", type=int, default=16, help="tokens")
    parser.add_argument("--shards", help="folder that keeps the shards, or has them")
    parser.add_argument("--no-write", action="store_true", help="print the result alone")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        result = stream(arguments, arguments.child)
        print(json.dumps(result))
        return result
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.shards or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "model.safetensors.index.json").is_file():
            write_shards(arguments.shape, getattr(torch, arguments.dtype), folder)
        with skeleton():
            weights = sum(p.numel() for p in make_model(arguments.shape).parameters())
        given = sys.argv[1:] if argv is None else argv
        command = [sys.executable, __file__, *given, "--child", str(folder)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    torch.set_num_threads(arguments.threads)
    known = facts()
    result = {
        **known,
        "shape": SHAPES[arguments.shape],
        "weights": weights,
        "dtype": arguments.dtype,
        "format": arguments.format,
        "method": arguments.method,
        **json.loads(done.stdout.splitlines()[-1]),
    }
    result["title"] = "A language model quantized from its shards"
    result["command"] = f"python benchmarks/llm_streaming.py --threads {arguments.threads}"
    result["table"] = table(result)
    result["facts"] = f"Shape of TinyLlama-1.1B, random weights. {describe(known)}."
    print(result["table"])
    if not arguments.no_write:
        write_json("llm_streaming", result)
    return result


if __name__ == "__main__":
    main()

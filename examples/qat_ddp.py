"""Quantization-aware training in several processes: DDP, or FSDP2 with `--fsdp`.

A ResNet-18 is trained on scikit-learn's handwritten digits (32x32) in float and then with
quantization (W8A8); every process converts, and all must hold the same INT8 model, bit for bit.

    torchrun --nproc-per-node 2 examples/qat_ddp.py           # about a minute on two cores
    torchrun --nproc-per-node 2 examples/qat_ddp.py --fsdp
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from _common import Data, digits, make_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset

import qtoolkit as qt


def main() -> None:
    args = parse_arguments()
    if "RANK" not in os.environ:
        raise SystemExit("start it with: torchrun --nproc-per-node 2 examples/qat_ddp.py")
    dist.init_process_group("gloo")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.get_world_size()))
    torch.manual_seed(args.seed)
    data = digits(args.seed, size=32)
    loader = shared_out(data, args.images, args.seed)

    # DDP begins with rank 0's parameters on all ranks and keeps them equal.
    model = make_model(args.model, data.classes)
    train("float", DistributedDataParallel(model), loader, args.epochs, 0.05)
    accuracy = qt.evaluate(model.eval(), data.test, progress=False)

    mapping = qt.get_default_qat_qconfig_mapping("x86")
    qat = qt.prepare_qat(model, mapping, example_inputs=(torch.randn(1, 3, 32, 32),))
    parallel = fully_shard(qat) if args.fsdp else DistributedDataParallel(qat)
    steps = args.qat_epochs * len(loader)
    schedule = qt.QATSchedule(freeze_bn=steps // 2, freeze_observers=steps * 3 // 4)
    kind = "FSDP2" if args.fsdp else "DDP"
    train(f"QAT, {kind}", parallel, loader, args.qat_epochs, 0.002, schedule.step)

    quantized = qt.convert(qat)  # with FSDP all ranks together, as it gathers the parameters
    hashes = [""] * dist.get_world_size()
    dist.all_gather_object(hashes, hash_of(quantized))
    if len(set(hashes)) > 1:
        raise SystemExit(f"the ranks hold different models: {hashes}")
    if dist.get_rank() == 0:
        int8 = qt.evaluate(quantized, data.test, progress=False)
        print(f"{data.name}, {args.model}: top-1 {accuracy:.2%} in float, {int8:.2%} in INT8")
        print(f"{len(hashes)} ranks hold the same INT8 model: sha256 {hashes[0][:16]}")
    dist.barrier()
    dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="resnet18", help="a torchvision classifier")
    parser.add_argument("--epochs", type=int, default=4, help="in float")
    parser.add_argument("--qat-epochs", type=int, default=2)
    parser.add_argument("--fsdp", action="store_true", help="shard parameters with FSDP2")
    parser.add_argument("--images", type=int, help="train on so many instead of all")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def shared_out(data: Data, images: int | None, seed: int) -> DataLoader:
    """The training images of this rank; all ranks have as many."""
    dataset = data.train.dataset
    if images is not None:
        dataset = Subset(dataset, range(min(images, len(dataset))))
    sampler = DistributedSampler(dataset, seed=seed, drop_last=True)
    return DataLoader(dataset, batch_size=16, sampler=sampler, drop_last=True)


def train(
    what: str,
    model: nn.Module,
    loader: DataLoader,
    epochs: int,
    rate: float,
    before_step: Callable[[nn.Module], None] = lambda model: None,
) -> None:
    """SGD with momentum and a rate that falls to zero."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs * len(loader)))
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        start, total = time.perf_counter(), 0.0
        for images, labels in loader:
            before_step(model)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            falling.step()
            total += loss.item()
        if dist.get_rank() == 0:
            seconds = time.perf_counter() - start
            mean = total / len(loader)
            print(f"{what}, epoch {epoch + 1}: loss {mean:.4f} ({seconds:.1f} s)", flush=True)


def hash_of(model: nn.Module) -> str:
    """Of all codes, scales and zero points, and of their names."""
    result = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        result.update(name.encode())
        if isinstance(value, torch.Tensor):
            result.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


if __name__ == "__main__":
    main()

"""What the examples share: data, models, the training loop, interleaved timing and tables."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, random_split

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# --- data ---------------------------------------------------------------------------------------


@dataclass
class Data:
    """Loaders of (images, labels) batches; `calibration` has training images without shuffling."""

    name: str
    classes: int
    train: DataLoader
    calibration: DataLoader
    test: DataLoader


def make_data(
    name: str, classes: int, train: Dataset, plain: Dataset, test: Dataset, seed: int
) -> Data:
    """`plain`: the training images without augmentation, for calibration."""
    order = torch.Generator().manual_seed(seed)
    return Data(
        name,
        classes,
        DataLoader(train, batch_size=32, shuffle=True, drop_last=True, generator=order),
        DataLoader(plain, batch_size=32),
        DataLoader(test, batch_size=32),
    )


class Shifted(Dataset):
    """Images moved by up to `pixels` in both directions, at random: new images in every epoch."""

    def __init__(self, data: Dataset, pixels: int, background: float) -> None:
        self.data, self.pixels, self.background = data, pixels, background

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, label = self.data[index]
        padded = nn.functional.pad(image, [self.pixels] * 4, value=self.background)
        top, left = torch.randint(2 * self.pixels + 1, (2,)).tolist()
        height, width = image.shape[-2:]
        return padded[:, top : top + height, left : left + width], label


def digits(seed: int, size: int = 64, test_images: int = 360) -> Data:
    """scikit-learn's 1797 handwritten digits of 8x8 pixels, enlarged to RGB images."""
    from sklearn.datasets import load_digits

    source = load_digits()
    images = torch.tensor(source.images, dtype=torch.float32).div(8).sub(1).unsqueeze(1)
    images = nn.functional.interpolate(images, size=(size, size), mode="bilinear")
    data = TensorDataset(images.expand(-1, 3, -1, -1), torch.tensor(source.target))
    order = torch.Generator().manual_seed(seed)
    train, test = random_split(data, [len(data) - test_images, test_images], order)
    shifted = Shifted(train, pixels=size // 16, background=-1.0)
    return make_data(f"digits {size}x{size}", 10, shifted, train, test, seed)


def image_folder(folder: Path, seed: int) -> Data:
    """An ImageFolder: FOLDER/train and FOLDER/val (or test) where they exist, else one split."""
    from torchvision import transforms as T

    tensor = [T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    plain = T.Compose([T.Resize(256), T.CenterCrop(224), *tensor])
    augment = T.Compose(
        [T.RandomResizedCrop(224, scale=(0.35, 1.0)), T.RandomHorizontalFlip(), *tensor]
    )

    def load(path: Path, transform: Callable) -> torchvision.datasets.ImageFolder:
        return torchvision.datasets.ImageFolder(str(path), transform)

    if not folder.is_dir():
        raise SystemExit(f"--data {folder}: no such folder")
    held_out = next((folder / n for n in ("val", "test") if (folder / n).is_dir()), None)
    if held_out and (folder / "train").is_dir():
        train = load(folder / "train", augment)
        unchanged = load(folder / "train", plain)
        shuffled = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        calibration = Subset(unchanged, shuffled.tolist())
        return make_data(
            folder.name, len(train.classes), train, calibration, load(held_out, plain), seed
        )
    augmented, unchanged = load(folder, augment), load(folder, plain)
    order = torch.randperm(len(unchanged), generator=torch.Generator().manual_seed(seed)).tolist()
    cut = max(1, len(order) // 5)
    test, rest = order[:cut], order[cut:]
    return make_data(
        folder.name,
        len(unchanged.classes),
        Subset(augmented, rest),
        Subset(unchanged, rest),
        Subset(unchanged, test),
        seed,
    )


def fake_data(seed: int, classes: int = 10) -> Data:
    """torchvision's FakeData at 224: random images, for sizes and latency only."""
    from torchvision import transforms as T

    transform = T.Compose([T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    data = torchvision.datasets.FakeData(192, (3, 224, 224), classes, transform)
    train, test = Subset(data, range(128)), Subset(data, range(128, 192))
    return make_data("FakeData 224x224", classes, train, train, test, seed)


# --- models -------------------------------------------------------------------------------------


def make_model(name: str, classes: int) -> nn.Module:
    """A torchvision classifier with random weights, without auxiliary outputs."""
    if name not in torchvision.models.list_models(torchvision.models):
        raise SystemExit(f"--model {name}: not a torchvision classifier")
    extra = {"googlenet", "inception_v3"}
    options = {"aux_logits": False, "init_weights": True} if name in extra else {}
    return torchvision.models.get_model(name, weights=None, num_classes=classes, **options)


def load_pretrained(model: nn.Module, name: str) -> bool:
    """Loads torchvision's own weights. True if all fit: a head for other classes stays random."""
    state = torchvision.models.get_model_weights(name).DEFAULT.get_state_dict(progress=True)
    own = model.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    model.load_state_dict(fitting, strict=False)
    return len(fitting) == len(own)


def load_weights(model: nn.Module, file: Path) -> None:
    """Loads a state dict, or the one under "state_dict" or "model" of a checkpoint."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise SystemExit(f"--weights {file}: no such file") from None
    except Exception as error:
        raise SystemExit(f"--weights {file}: not a PyTorch state dict ({error})") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise SystemExit(f"--weights {file}: does not fit the model: {error}") from error


def train(
    model: nn.Module,
    loader: DataLoader,
    epochs: int,
    rate: float,
    before_epoch: Callable[[int], None] = lambda epoch: None,
) -> None:
    """SGD with momentum; the rate rises for a short while and falls to zero over all epochs."""
    if epochs == 0:
        return
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    steps = epochs * len(loader) + 1
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        rate,
        total_steps=steps,
        pct_start=max(0.2, 2 / steps),  # the rise takes a step at least
    )
    for epoch in range(epochs):
        before_epoch(epoch)
        start, total = time.perf_counter(), 0.0
        for images, labels in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        seconds = time.perf_counter() - start
        print(
            f"  epoch {epoch + 1}/{epochs}: loss {total / len(loader):.4f}  ({seconds:.1f} s)",
            flush=True,
        )


# --- timing and tables --------------------------------------------------------------------------


def time_interleaved(
    runs: dict[str, Callable[[], object]], rounds: int = 15, seconds: float = 0.04
) -> dict[str, list[float]]:
    """Milliseconds per call of each run, `rounds` samples of at least about `seconds` each.

    All runs take turns in every round, so that a slow moment of the machine hits all alike.
    """
    calls = {}
    for name, run in runs.items():
        for _ in range(3):  # the first calls allocate and pack
            run()
        start = time.perf_counter()
        run()
        calls[name] = max(1, round(seconds / (time.perf_counter() - start)))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            samples[name].append((time.perf_counter() - start) / calls[name] * 1e3)
    return samples


def medians(samples: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in samples.items()}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table with its columns aligned, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        first, *rest = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in
                        enumerate(zip(cells, widths)))  # fmt: skip
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in
                          enumerate(widths)) + "|"  # fmt: skip
    return "\n".join([line(header), rule, *map(line, rows)])

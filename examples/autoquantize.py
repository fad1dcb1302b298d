"""Quantizes classifiers without a person's choice: the first way whose accuracy holds is taken.

torchvision's architectures are trained for a few epochs on scikit-learn's handwritten digits
(enlarged), then ``qt.autoquantize`` walks from the fastest recipe to the safest. The table says
which step held; every step that was tried is printed and written, with a page for each network.

    python examples/autoquantize.py                                  # five networks, 10 minutes
    python examples/autoquantize.py --models mobilenet_v2 --max-drop 0.005
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from _common import Data, cpu_name, digits, make_model, markdown_table, train
from torch import nn

import qtoolkit as qt

MODELS = (
    "resnet18",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "shufflenet_v2_x1_0",
    "regnet_x_400mf",
)


def main() -> None:
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    results = []
    for name in args.models:
        data = digits(args.seed, args.size)
        torch.manual_seed(args.seed)
        model = trained(name, data, args)
        result = qt.autoquantize(
            model,
            data.calibration,
            lambda m, data=data: qt.evaluate(m, data.test, progress=False),
            args.max_drop,
            train_loader=data.train,
            max_batches=8,
            resume=args.output / f"{name}.run" if args.resume else None,
            progress=False,
        )
        print(f"\n{name}\n{result}\n", flush=True)
        result.to_html(args.output / f"autoquantize_{name}.html")
        results.append(
            {
                "model": name,
                "met": result.met,
                "chosen": result.chosen,
                "float": result.float_score,
                "seconds": round(sum(step.seconds for step in result.steps), 1),
                "steps": [asdict(step) for step in result.steps],
            }
        )
    report(results, args)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS, help="torchvision classifiers")
    parser.add_argument("--max-drop", type=float, default=0.01)
    parser.add_argument("--epochs", type=int, default=8, help="of FP32 training")
    parser.add_argument("--size", type=int, default=32, help="pixels of the enlarged digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on where a run was interrupted")
    parser.add_argument("--output", type=Path, default=Path("results"))
    return parser.parse_args()


def trained(name: str, data: Data, args: argparse.Namespace) -> nn.Module:
    """The network in float; its weights are kept for the next run."""
    model = make_model(name, data.classes)
    file = args.output / f"{name}_{args.size}_{args.epochs}_{args.seed}.weights.pt"
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
    else:
        print(f"--- {name}: FP32 training, {args.epochs} epochs", flush=True)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1  # MobileNetV3's 0.01 needs more steps than there are
        train(model, data.train, args.epochs, rate=0.05)
        torch.save(model.state_dict(), file)
    return model.eval()


def report(results: list[dict], args: argparse.Namespace) -> None:
    rows = []
    for result in results:
        tried = [step for step in result["steps"] if step["size"]]
        chosen = next(step for step in tried if step["name"] == result["chosen"])
        rows.append(
            [
                result["model"],
                f"{100 * result['float']:.2f}",
                f"{100 * chosen['score']:.2f}",
                "yes" if result["met"] else "no",
                result["chosen"],
                str(len(tried)),
                f"{result['seconds']:.0f}",
            ]
        )
    header = ["Network", "Float %", "Quantized %", "Holds", "Step", "Tried", "s"]
    table = markdown_table(header, rows)
    facts = (
        f"digits {args.size}x{args.size}, seed {args.seed}, 360 test images (one is 0.28 points), "
        f"max_drop {args.max_drop:g}; "
        f"{cpu_name()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, "
        f"qtoolkit {qt.__version__}."
    )
    print(f"{table}\n\n{facts}")
    file = args.output / "autoquantize.json"
    content = {
        "title": "autoquantize on the digits",
        "command": f"python examples/autoquantize.py --models {' '.join(args.models)}",
        "facts": facts,
        "max_drop": args.max_drop,
        "results": results,
        "table": table,
    }
    file.write_text(json.dumps(content, indent=2) + "\n")
    print(f"Written: {file}")


if __name__ == "__main__":
    main()

"""What benchmarks/models.py measured, as tables and as a picture."""

from __future__ import annotations

import html
from typing import Any

from _common import markdown_table  # (examples/)

Result = dict[str, Any]

# Runtimes, by the beginning of their candidates' names; the fastest candidate stands for one.
PEERS = ("PyTorch FP32", "torch.ao ", "torchao ", "ONNX Runtime ", "OpenVINO")
COLORS = ("#d62728", "#9aa5b1", "#5b8def", "#8fb8f6", "#e0a33e", "#6aa84f")
HELD = {
    "avx512vnni": "held to AVX512-VNNI",
    "native": "with all that the CPU has",
    "avx2": "held to AVX2",
}


def ours(result: Result) -> str:
    """The candidate that the ratios are about: the plan, without it the scripted model."""
    names = ("qtoolkit plan", "qtoolkit scripted", "qtoolkit eager")
    return next(name for name in names if name in result["min_ms"])


def fastest(result: Result, peer: str) -> str | None:
    """The fastest candidate of a peer, None where it took no part or was not held."""
    names = [
        name
        for name in result["min_ms"]
        if name.startswith(peer) and "not held" not in result["ran"][name]
    ]
    return min(names, key=result["min_ms"].__getitem__, default=None)


def peak_path(result: Result) -> str | None:
    """The path whose instruction shares are of: the one held to, else avx512vnni."""
    wanted = "avx512vnni" if result["isa"] == "native" else result["isa"]
    peaks = result["peak_macs_per_second"]
    return wanted if wanted in peaks else next(iter(peaks), None)


def share_of_peak(result: Result, name: str) -> float | None:
    """The median over rounds: a candidate's speed as a share of the peak's in the same round."""
    path = peak_path(result)
    return None if path is None else result["shares_of_peak"][path][name]


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def describe(result: Result) -> str:
    peaks = result["peak_macs_per_second"].items()
    return (
        f"{result['model']}, batch {result['batch']}, {result['threads']} threads, "
        f"{HELD[result['isa']]}; {result['macs'] / 1e9:.3f} GMAC, peak in GMAC/s: "
        + ", ".join(f"{path} {macs / 1e9:.0f}" for path, macs in peaks)
    )


def table(result: Result) -> str:
    """Every candidate of one configuration."""
    mine, best = ours(result), result["min_ms"]
    header = ["", "min ms", "median ms", f"{mine} / it"]
    header += [f"of {peak_path(result)} peak", "SQNR dB", "ran"]
    rows = [
        [
            name,
            number(milliseconds, 2),
            number(result["median_ms"][name], 2),
            number(best[mine] / milliseconds, 3),
            number(share_of_peak(result, name), 3),
            number(result["sqnr_db"].get(name), 1),
            result["ran"][name],
        ]
        for name, milliseconds in best.items()
    ]
    left_out = [f"left out: {peer}: {why}" for peer, why in result["left_out"].items()]
    return "\n".join([markdown_table(header, rows), *left_out])


def layer_table(result: Result, form: str) -> str:
    """Where the time of one of qtoolkit's forms goes, in the order of execution."""
    layers, path = result["layers"][form], peak_path(result)
    total = sum(layer["ms"] for layer in layers) or 1.0
    header = ["", "", "ms", "of the time", "MMAC", f"of {path} peak"]
    rows = []
    for layer in layers:
        share = None
        if path and layer["macs"] and layer["ms"]:
            share = layer["macs"] / (layer["ms"] * 1e-3) / result["peak_macs_per_second"][path]
        rows.append(
            [
                layer["name"],
                layer["kind"],
                number(layer["ms"], 4),
                number(layer["ms"] / total, 3),
                number(layer["macs"] / 1e6 if layer["macs"] else None, 2),
                number(share, 3),
            ]
        )
    rows.append(["all", "", number(total, 4), number(1.0, 3), "", ""])
    return markdown_table(header, rows)


def configuration(result: Result) -> str:
    return f"{result['model']}, batch {result['batch']}, {result['threads']} threads"


def in_order(results: list[Result]) -> list[Result]:
    models = ["resnet18", "resnet50", "mobilenet_v2"]
    return sorted(
        results,
        key=lambda r: ((*models, r["model"]).index(r["model"]), r["batch"], r["threads"]),
    )


def summary(results: list[Result]) -> str:
    """One row a configuration: qtoolkit's time as a share of each peer's fastest."""
    header = ["", "qtoolkit ms", "of the peak", *(f"/ {peer.strip()}" for peer in PEERS)]
    rows = []
    for result in in_order(results):
        mine, best = ours(result), result["min_ms"]
        peers = [fastest(result, peer) for peer in PEERS]
        rows.append(
            [
                configuration(result),
                number(best[mine], 2),
                number(share_of_peak(result, mine), 3),
                *(number(best[mine] / best[name] if name else None, 3) for name in peers),
            ]
        )
    return markdown_table(header, rows)


def picture(results: list[Result], title: str) -> str:
    """An SVG of bars: the share of the peak that the fastest of each runtime reaches."""
    labels = ("qtoolkit", *(peer.strip() for peer in PEERS))
    results = in_order(results)
    groups = [
        [ours(result), *(fastest(result, peer) for peer in PEERS)]  # as labels
        for result in results
    ]
    shares = [
        [share_of_peak(result, name) or 0.0 if name else 0.0 for name in group]
        for result, group in zip(results, groups)
    ]
    top = max([1.0, *(share for group in shares for share in group)])
    bar, left, width, head = 12, 230, 520, 64
    group_height = bar * len(labels) + 14
    height = head + group_height * len(results) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 60}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="100%" height="{height}" fill="white"/>',
        f'<text x="10" y="20" font-size="14">{html.escape(title)}</text>',
    ]
    for index, label in enumerate(labels):
        x = 10 + index * 125
        parts.append(f'<rect x="{x}" y="34" width="10" height="10" fill="{COLORS[index]}"/>')
        parts.append(f'<text x="{x + 14}" y="43">{html.escape(label)}</text>')
    for row, (result, group) in enumerate(zip(results, shares)):
        y = head + row * group_height
        parts.append(f'<text x="10" y="{y + 40}">{html.escape(configuration(result))}</text>')
        for index, share in enumerate(group):
            if share == 0.0:
                continue
            at, length = y + index * bar, share / top * width
            parts.append(
                f'<rect x="{left}" y="{at}" width="{length:.1f}" height="{bar - 2}" '
                f'fill="{COLORS[index]}"/>'
                f'<text x="{left + length + 4:.1f}" y="{at + 9}" font-size="10">{share:.2f}</text>'
            )
    x = left + width / top
    parts.append(
        f'<line x1="{x:.1f}" y1="{head - 6}" x2="{x:.1f}" y2="{height - 8}" stroke="black" '
        'stroke-dasharray="4 3"/>'
    )
    return "\n".join([*parts, "</svg>", ""])


def facts(results: list[Result]) -> str:
    """CPUs and versions, each once."""
    versions = {f"{n} {v}" for r in results for n, v in r["versions"].items()}
    return "; ".join([*sorted({r["cpu"] for r in results}), ", ".join(sorted(versions))])

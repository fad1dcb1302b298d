"""What is known of the values between layers: their sizes, and samples of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qtoolkit.algorithms.context import Context
from qtoolkit.algorithms.scaling import Link, Reader, attention_candidates, find_links

# Relative difference of outputs that are the same but for rounding.
_SAME = 1e-3


def linear_links(context: Context) -> list[Link]:
    """The values that linear layers alone read and that can be rescaled: what layer norms and other
    layers give, and the values of attentions."""
    links = [
        link
        for link in find_links(context.prepared)
        if all(isinstance(reader.module, nn.Linear) for reader in link.readers)
    ]
    taken = {reader.module for link in links for reader in link.readers}
    for link in attention_candidates(context.prepared):
        if link.readers[0].module not in taken and keeps_outputs(context, link):
            links.append(link)
    return links


def keeps_outputs(context: Context, link: Link) -> bool:
    """Whether dividing the channels of a value leaves what the network gives as it was; tried on
    the first batch."""
    if not context.batches:
        return False
    expected = context.run(context.batches[0])
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(link.channels, generator=generator) + 0.5
    scale = scale.to(link.maker.weight.device)
    modules = [link.maker, *(reader.module for reader in link.readers)]
    kept = [{k: v.clone() for k, v in module.state_dict().items()} for module in modules]
    try:
        link.divide(scale)
        found = context.run(context.batches[0])
    finally:
        for module, state in zip(modules, kept):
            module.load_state_dict(state)
    return all(
        float((a - b).abs().max()) <= _SAME * float(a.abs().max())
        for a, b in zip(_tensors(expected), _tensors(found))
    )


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() and value.numel() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [t for part in value for t in _tensors(part)] if isinstance(value, list | tuple) else []


class ChannelValues:
    """The inputs of linear layers, channel by channel.

    Attributes:
        largest: largest magnitude of each channel over all data, by reader.
        mean: mean magnitude.
        rows: some rows, [rows, channels].
    """

    def __init__(self, context: Context, readers: Sequence[Reader], rows: int = 0) -> None:
        self.largest: dict[Reader, Tensor] = {}
        self.mean: dict[Reader, Tensor] = {}
        self.rows: dict[Reader, Tensor] = {}
        sums: dict[Reader, Tensor] = {}
        counts: dict[Reader, int] = {}
        share = -(-rows // max(len(context.batches), 1))

        def see(reader: Reader, x: Tensor) -> None:
            x = x.detach().reshape(-1, x.shape[-1])
            most = x.abs().amax(0)
            known = self.largest.get(reader)
            self.largest[reader] = most if known is None else torch.maximum(known, most)
            sums[reader] = sums.get(reader, 0.0) + x.abs().double().sum(0)
            counts[reader] = counts.get(reader, 0) + len(x)
            if rows:
                some = x[:: max(len(x) // share, 1)][:share]
                known = self.rows.get(reader)
                self.rows[reader] = some if known is None else torch.cat([known, some])

        handles = [
            reader.module.register_forward_pre_hook(
                lambda _, args, reader=reader: see(reader, args[0])
            )
            for reader in readers
        ]
        try:
            for batch in context.batches:
                context.run(batch)
        finally:
            for handle in handles:
                handle.remove()
        self.mean = {reader: (sums[reader] / counts[reader]).float() for reader in sums}

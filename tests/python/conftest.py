"""Settings of the whole test run."""

from __future__ import annotations

import torch

# The networks here are tiny: one thread is faster than two, and tests of threads set their own.
torch.set_num_threads(1)

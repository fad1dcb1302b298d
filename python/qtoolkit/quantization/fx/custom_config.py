"""Custom configurations, where torch.ao has them."""

from qtoolkit.quantization.custom_config import (
    ConvertCustomConfig,
    FuseCustomConfig,
    PrepareCustomConfig,
)

__all__ = ["ConvertCustomConfig", "FuseCustomConfig", "PrepareCustomConfig"]

"""From a float model to a prepared and a quantized one, on ``torch.fx`` graphs."""

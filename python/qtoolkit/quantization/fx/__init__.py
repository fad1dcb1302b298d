"""Where torch.ao has its custom configurations."""

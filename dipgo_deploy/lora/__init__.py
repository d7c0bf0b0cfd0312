"""LoRA files merged into the weights of an engine directory. No torch."""

"""Base models: families, checkpoints and where they come from."""

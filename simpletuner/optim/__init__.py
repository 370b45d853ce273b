"""How gradients become new weights: optimizers and learning rates."""

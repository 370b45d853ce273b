"""What the model learns to predict: noise, timesteps and the loss."""

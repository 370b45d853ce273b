"""SimpleTuner: fine-tune diffusion image models from a folder of pictures."""

__version__ = "0.1.0"

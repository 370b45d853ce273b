"""Tiny pipelines with seeded random weights, saved as ordinary diffusers folders."""

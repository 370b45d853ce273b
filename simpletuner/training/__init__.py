"""A run from its settings to the saved weights."""

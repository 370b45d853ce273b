"""Dtypes and memory: making a model fit its device."""

"""Receivers of a run's events, one file each."""

"""Tells the world about a run: the console, the log of events, trackers."""

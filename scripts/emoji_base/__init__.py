"""Trains the small emoji model that ships; `scripts/build_emoji_base.py` runs it."""

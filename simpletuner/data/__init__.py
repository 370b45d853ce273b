"""Pictures and captions: where they lie, what is done to them, and in which order they come."""

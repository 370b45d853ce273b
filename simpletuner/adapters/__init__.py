"""Which weights train, how they are attached, and how they are written."""

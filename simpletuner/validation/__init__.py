"""Pictures and scores that show whether a run learns."""

"""Uploading what was trained."""

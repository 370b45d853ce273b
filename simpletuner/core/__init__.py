"""What every other package may use: errors, types, events, seeds, tables, settings, files."""

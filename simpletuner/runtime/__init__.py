"""The machine a run stands on."""

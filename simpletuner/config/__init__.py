"""Settings files, the command line and the environment, read into one configuration."""

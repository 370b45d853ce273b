"""What a person starts: the command line and the generator of the documentation."""

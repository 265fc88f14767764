"""The command line, and the shape of the project."""

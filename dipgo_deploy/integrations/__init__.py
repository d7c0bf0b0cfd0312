"""Other programs' interfaces to engine directories: each imports its program inside functions."""

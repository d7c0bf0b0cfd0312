"""Command lines: thin click commands, each one call into the library."""

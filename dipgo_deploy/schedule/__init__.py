"""The document that goes in: which blocks run at which step, its validation, builders and importers."""

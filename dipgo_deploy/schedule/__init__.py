"""The document that goes in: which blocks run at which evaluation, its validation, builders and importers."""

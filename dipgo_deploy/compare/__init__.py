"""Agreement of an engine directory with the torch supernet, per variant and over the whole loop."""

"""Quality measures: what an image is recognised as, and how far a set of images lies from held-out ones."""

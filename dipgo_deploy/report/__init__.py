"""An engine directory as a page to look at. Needs no torch."""

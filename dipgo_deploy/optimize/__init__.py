"""From a model to an engine directory in one call: launches searched, solver fitted, exported, judged."""

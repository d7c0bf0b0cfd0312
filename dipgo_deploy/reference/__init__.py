"""The model in torch, under a schedule: what loads it, prepares a run of it, and records that for a comparison."""

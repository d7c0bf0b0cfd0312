"""Finding schedules: the DiP-GO pruner (arXiv 2410.16942), its post-processing, and baselines to hold it against."""

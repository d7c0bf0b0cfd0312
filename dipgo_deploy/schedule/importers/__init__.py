"""Foreign schedule formats, one file each; every importer reads gates and hands them to ``rows``."""

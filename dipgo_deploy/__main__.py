"""``python -m dipgo_deploy``: the command ``dipgo``."""

import sys

from dipgo_deploy.cli.main import main

sys.exit(main(None))

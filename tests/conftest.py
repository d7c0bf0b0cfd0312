"""Makes the helpers beside this file (``toy_engine``) and the repository's ``tools`` importable from all tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

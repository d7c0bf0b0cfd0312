"""Makes the helpers beside this file (``toy_engine``) importable from all tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

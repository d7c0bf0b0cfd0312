"""The search's tiny problems serve the calibration too."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("search_fixtures", Path(__file__).parents[1] / "search/conftest.py")
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)

_one_thread, _traced_once = _module._one_thread, _module._traced_once
dit_folder, unet_folder = _module.dit_folder, _module.unet_folder
problem, unet_problem = _module.problem, _module.unet_problem

"""Keep the libraries' own progress bars and hints out of a command's output; errors still raise."""

from __future__ import annotations

import os
import warnings


def quiet_libraries() -> None:
    """Silence diffusers' and transformers' bars, hints and deprecation warnings in this process."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(diffusers|transformers|torch)\..*")

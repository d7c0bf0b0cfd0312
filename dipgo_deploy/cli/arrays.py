"""Arrays from files that a command is given."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from dipgo_deploy.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from dipgo_deploy.runtime.requests import Embeds

_NAMED = (".npz", ".safetensors")


def load_array(option: str, path: Path | None) -> np.ndarray | None:
    """Read a .npy file; pickled objects are refused.

    Raises:
        UserError: no such file, or not an array of plain numbers.
    """
    if path is None:
        return None
    import numpy as np

    if not path.is_file():
        raise UserError(f"{option} {path}: no such file")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{option} {path}: not a .npy file of numbers ({error})") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{option} {path}: holds several arrays; save one with numpy.save")
    return array


def load_embeds(option: str, given: tuple[str, ...]) -> Embeds | None:
    """Embeddings: one .npy file; ``NAME=FILE.npy`` for each condition; or one .npz or .safetensors file with the
    conditions by name. None where nothing is given.

    Raises:
        UserError: a file that cannot be read, a name given twice, or several files without names.
    """
    if not given:
        return None
    pairs = [_name_and_file(text) for text in given]
    if len(pairs) == 1 and pairs[0][0] is None:
        path = pairs[0][1]
        return _load_named(option, path) if path.suffix.lower() in _NAMED else load_array(option, path)
    found: dict[str, np.ndarray] = {}
    for name, path in pairs:
        if name is None:
            raise UserError(f"{option} {path}: one of several; give each with its condition's name, NAME={path}")
        if name in found:
            raise UserError(f"{option} {name}={path}: {name} is given twice; give it once")
        array = load_array(f"{option} {name}:", path)
        assert array is not None  # only without a path
        found[name] = array
    return found


def _name_and_file(text: str) -> tuple[str | None, Path]:
    name, sign, file = text.partition("=")
    # A file whose own name has the sign in it is that file.
    return (name, Path(file)) if sign and name.isidentifier() and not Path(text).is_file() else (None, Path(text))


def _load_named(option: str, path: Path) -> dict[str, np.ndarray]:
    import numpy as np
    import safetensors

    from dipgo_deploy.bundle.safetensors_file import read_tensors

    if not path.is_file():
        raise UserError(f"{option} {path}: no such file")
    try:
        if path.suffix.lower() == ".safetensors":
            return read_tensors(path)
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile, safetensors.SafetensorError) as error:
        raise UserError(
            f"{option} {path}: not a {path.suffix.lower()} file of arrays ({' '.join(str(error).split())})"
        ) from None

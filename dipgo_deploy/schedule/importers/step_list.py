"""Lists of steps that run the whole denoiser, the other steps adding its blocks' last residual.

BudCache (arXiv 2606.13496) writes ``cache_step``, the steps that do NOT run, into a checkpoint of torch; its code
adds what all blocks together added at the last step that ran. LeMiCa (2511.00090) does the same at the steps of its
path, and DPCache (2602.22654) forecasts instead: give ``--forecast taylor``. A list of steps, or of 0 and 1 for all
of them, can be written by hand. The sum of the blocks' residuals is the residual of the whole, so each block's is
kept.
"""

from __future__ import annotations

from typing import Any

from dipgo_deploy.documents import parse
from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.importers.base import Imported, Importer, Source, check_steps_of, whole_steps
from dipgo_deploy.schedule.importers.settings import Settings
from dipgo_deploy.schedule.importers.torch_storage import TorchArchive

_ZIP = b"PK\x03\x04"


def computed(settings: Settings, steps: int) -> tuple[bool, ...]:
    """Which of the T evaluations run."""
    if "mask" in settings:
        mask = settings.mask("mask")
        if len(mask) != steps:
            raise UserError(f"mask: {len(mask)} entries, but the sampler evaluates the denoiser {steps} times")
        return mask
    name = settings.any_of("compute_step", "cache_step")
    listed = settings.integers(name)
    out = next((step for step in listed if not 0 <= step < steps), None)
    if out is not None:
        raise UserError(f"{name}: step {out} is none of the {steps} evaluations 0 to {steps - 1}")
    chosen = set(listed)
    return tuple((step in chosen) == (name == "compute_step") for step in range(steps))


def _settings(data: bytes) -> Settings:
    if data.startswith(_ZIP):
        document: Any = TorchArchive.read(data, frozenset()).document
    else:
        try:
            document = parse(data)
        except ValueError as error:
            raise UserError(f"neither JSON ({error}) nor a file of torch.save") from error
    if isinstance(document, list):
        kind = (
            "mask" if len(document) > 2 and set(map(str, document)) <= {"0", "1", "True", "False"} else "compute_step"
        )
        document = {kind: document}
    if not isinstance(document, dict):
        raise UserError("neither a list of steps nor an object with compute_step, cache_step or mask")
    known = ("compute_step", "cache_step", "mask", "num_steps", "steps")
    # A checkpoint has more in it, such as the loss that the search came to.
    return Settings({name: document[name] for name in known if name in document}, "a list of steps")


def _read(data: bytes, source: Source) -> Imported:
    settings = _settings(data)
    check_steps_of(settings, settings.any_of("num_steps", "steps"), source)
    return Imported(whole_steps(computed(settings, source.steps), len(source.names)))


IMPORTER = Importer(
    kind="step-list",
    title="Read a list of the steps that run: of BudCache, LeMiCa, DPCache (with --forecast taylor) or your own.",
    file="BudCache's checkpoint, which is read as data, or JSON with compute_step, cache_step or mask",
    read=_read,
    example="budcache.pt --model ./flux --steps 28 -o budcache.json",
    cache="residual",
)

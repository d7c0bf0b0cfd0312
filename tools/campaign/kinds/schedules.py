"""Schedule files: read by ``dipgo-schedule validate``, half of them against a model and its sampler."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dipgo_deploy.schedule.document import Schedule
from tools.campaign.material import Material
from tools.campaign.mutate import change_json, pick
from tools.campaign.verdict import Ran, Verdict
from tools.campaign.worker import Trial

_SHIPPED = Path(__file__).resolve().parents[3] / "dipgo_deploy" / "assets" / "schedules"


@dataclass(frozen=True)
class Schedules:
    """``dipgo-schedule validate``."""

    material: Material
    name: str = "schedules"

    def trial(self, random: np.random.Generator, folder: Path) -> Trial:
        """A schedule of the class model (three of four), half of these with a solver, or one of the package's."""
        own = pick(random, (self.material.class_schedule, self.material.fitted_schedule))
        path = own if random.random() < 0.75 else pick(random, sorted(_SHIPPED.glob("*.json")))
        original = path.read_bytes()
        label, text = change_json(json.loads(original), random)
        (folder / "schedule.json").write_bytes(text)
        argv = ["schedule", "validate", "schedule.json"]
        if path == own and random.random() < 0.7:
            argv += ["--model", str(self.material.class_model)]
        return Trial(label, [argv], lambda ran: as_written(text, original, ran))


def as_written(text: bytes, original: bytes, ran: Ran) -> tuple[Verdict, str]:
    """What was read has to be what an independent reader finds in the file, value by value and type by type."""
    try:
        written = strict_json(text)
    except (ValueError, RecursionError) as error:
        return Verdict.SILENT, f"accepted, but no JSON: {error}"
    read = json.loads(Schedule.from_json(text).to_json())
    if typed(_with_defaults(written)) != typed(_with_defaults(read)):
        return Verdict.SILENT, "accepted, but read as something else than what is written"
    same = typed(read) == typed(json.loads(Schedule.from_json(original).to_json()))
    return (Verdict.SAME if same else Verdict.VALID), ""


def _with_defaults(document: dict[str, Any]) -> dict[str, Any]:
    """With what the format says of fields that are left out."""
    solver = document.get("solver")
    filled = None if solver is None else {"noises": 0, "picture": False, "provenance": {}, **solver}
    return {"provenance": {}, **document, "solver": filled}


def strict_json(text: bytes) -> Any:
    """JSON as its standard has it (UTF-8, with or without a mark in front): no key twice, no NaN.

    Raises:
        ValueError: anything else.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    def refuse(token: str) -> Any:
        raise ValueError(f"{token} is no number")

    return json.loads(text.decode("utf-8-sig"), object_pairs_hook=once, parse_constant=refuse)


def typed(value: Any) -> Any:
    """A form in which 1 and True differ, 1 and 1.0 do not, and the order of keys does not matter."""
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [typed(item) for item in value]
    return isinstance(value, bool), value

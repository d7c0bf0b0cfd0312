"""Write the schedules that are shipped with the built-in models (``dipgo_deploy/assets/schedules``).

Run from the repository's root, with the extra ``export`` installed: ``python -m tools.make_schedules``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from dipgo_deploy.models.target import schedule_target
from dipgo_deploy.schedule import builders
from dipgo_deploy.schedule.builders import Target
from dipgo_deploy.schedule.document import Gates, Schedule

FOLDER = Path(__file__).resolve().parent.parent / "dipgo_deploy" / "assets" / "schedules"
STEPS = 50

SOURCE = "the gates that DiP-GO's authors (arXiv 2410.16942) released for Stable Diffusion 1.5, ratio 0.80"
KEPT = (0, 7, 13, 19, 20, 21, 26, 32, 39, 48)
DROPPED: Mapping[int, Sequence[str]] = {7: ("down_blocks.3",)}


def released_gates(target: Target) -> Gates:
    """The released pattern: 50 rows; a sampler that evaluates once more (PNDM) has the last row repeated."""
    rows = [
        tuple(step in KEPT and name not in DROPPED.get(step, ()) for name in target.block_names)
        for step in range(STEPS)
    ]
    return tuple(rows + rows[-1:] * (target.steps - STEPS))


def released(sampler: str) -> Schedule:
    """The released pattern for fashion-sd, whose nine whole blocks are those of Stable Diffusion 1.5."""
    target = schedule_target("fashion-sd", sampler, STEPS)
    parameters: dict[str, Any] = {
        "source": SOURCE,
        "kept_evaluations": list(KEPT),
        "dropped_blocks": {str(step): list(names) for step, names in DROPPED.items()},
        "last_row_repeated": target.steps - STEPS,
    }
    return target.schedule(released_gates(target), "released pattern", parameters)


def uniform(interval: int) -> Schedule:
    """Every block of fashion-dit at every ``interval``-th step, none in between."""
    target = schedule_target("fashion-dit", "ddim", STEPS)
    gates = builders.uniform(target.steps, len(target.blocks), interval)
    return target.schedule(gates, "uniform", {"interval": interval})


def random(ratio: float, seed: int) -> Schedule:
    """A share of fashion-dit's gates removed at random."""
    target = schedule_target("fashion-dit", "ddim", STEPS)
    gates = builders.random(target.steps, len(target.blocks), ratio, seed)
    return target.schedule(gates, "random", {"ratio": ratio, "seed": seed})


def shipped() -> dict[str, Schedule]:
    """File name -> schedule."""
    return {
        "fashion-sd-ddim50.json": released("ddim"),
        "fashion-sd-pndm50.json": released("pndm"),
        "fashion-dit-uniform5.json": uniform(5),
        "fashion-dit-random50.json": random(0.5, 0),
    }


@click.command()
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), default=FOLDER, show_default=True)
def main(folder: Path) -> None:
    """Write the shipped schedules into FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, schedule in shipped().items():
        schedule.save(folder / name)
        click.echo(f"{folder / name}: {schedule.steps} evaluations, {schedule.kept_share:.1%} of the gates kept")


if __name__ == "__main__":
    main()

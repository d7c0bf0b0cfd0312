"""Layer schedules of other methods, imported, exported and run, against DiT's loop written out as those methods do.

The reference is no part of this package: `dit_by_hand` with stock DDIM steps. Widths are tiny and weights random; depth
and steps are those of the released schedules, which decide how many variants there are.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dit_by_hand
import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel

from dipgo_deploy.backends import create_backend
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, plan_export, publish, replan
from dipgo_deploy.models.target import schedule_target
from dipgo_deploy.runtime.loop import DenoisingLoop
from dipgo_deploy.schedule import builders
from dipgo_deploy.schedule.builders import Target
from dipgo_deploy.schedule.document import Schedule
from dipgo_deploy.schedule.importers.registry import import_schedule

PUBLISHED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "published-schedules"
# DiT's training noise.
BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "clip_sample": False}
GUIDANCE = 4.0
LABEL, NULL = 7, 10
OPTIONS = ExportOptions(layout="variants", check=False, components=False)
RELEASED_DEPTH = 28

torch.set_num_threads(1)


@dataclass(frozen=True)
class Traced:
    """A tiny DiT, the folder it is saved in, and its one trace at granularity ``layer``."""

    model: DiTTransformer2DModel
    folder: Path
    planned: PlannedExport

    def target(self, steps: int) -> Target:
        return schedule_target(str(self.folder), "ddim", steps, "layer", None)


def _traced(folder: Path, depth: int) -> Traced:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=depth,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.eval().requires_grad_(False)
    model.save_pretrained(folder)
    DDIMScheduler(**BETAS).save_pretrained(folder / "scheduler")
    target = schedule_target(str(folder), "ddim", 2, "layer", None)
    full = target.schedule(builders.full(target.steps, len(target.blocks)), "full", {})
    return Traced(model, folder, plan_export(str(folder), full, OPTIONS))


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """Four blocks."""
    return _traced(tmp_path_factory.mktemp("dit4"), 4)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """As many blocks as DiT-XL/2."""
    return _traced(tmp_path_factory.mktemp("dit28"), RELEASED_DEPTH)


def _by_hand(model: Any, rows: Sequence[Sequence[bool]], noise: torch.Tensor) -> torch.Tensor:
    """Guided DDIM over all evaluations, each computing the layers of its row and reusing the others' last outputs."""
    scheduler = DDIMScheduler(**BETAS)
    scheduler.set_timesteps(len(rows))
    stored: dict[int, torch.Tensor] = {}
    latent, labels = noise, torch.tensor([NULL, LABEL])
    for row, timestep in zip(rows, scheduler.timesteps, strict=True):
        output = dit_by_hand.forward(model, torch.cat([latent] * 2), timestep.expand(2), labels, row, stored)
        unconditional, conditional = output[:, :4].chunk(2)
        guided = unconditional + GUIDANCE * (conditional - unconditional)
        latent = scheduler.step(guided, timestep, latent).prev_sample
    return latent


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def _check(traced: Traced, schedule: Schedule, rows: Sequence[Sequence[bool]], folder: Path) -> PlannedExport:
    """The engine's final latent for ``schedule`` is that of the loop written out with ``rows``."""
    planned = replace(replan(traced.planned, schedule), options=OPTIONS)
    publish(planned, folder)
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    loop = DenoisingLoop(Bundle.open(folder), create_backend("cpu", threads=1), poison=True)
    labels = torch.tensor([NULL, LABEL]).numpy()
    engine = torch.from_numpy(loop.run(noise.numpy(), {"class_labels": labels}, guidance_scale=GUIDANCE))
    expected = _by_hand(traced.model, rows, noise)
    assert _relative(engine, expected) < 1e-5
    # The schedule matters: without any reuse the picture is another.
    assert _relative(_by_hand(traced.model, [[True] * len(rows[0])] * len(rows), noise), expected) > 1e-2
    return planned


# --- the formats, by files that these tests make ---

STEPS, DEPTH = 10, 4
ORDER = [(kind, number) for number in range(DEPTH) for kind in ("attn", "mlp")]


def _lists(seed: int, count: int) -> list[list[int]]:
    source = random.Random(seed)
    return [[1] + [int(source.random() < 0.5) for _ in range(STEPS - 1)] for _ in range(count)]


def _by_kind(path: Path) -> list[list[bool]]:
    attention, mlp = _lists(0, 2)
    path.write_text(json.dumps({"attn": attention, "mlp": mlp}))
    return [[bool(attention[step]), bool(mlp[step])] * DEPTH for step in range(STEPS)]


def _attention_only(path: Path) -> list[list[bool]]:
    (attention,) = _lists(1, 1)
    path.write_text(json.dumps({"attn1": attention}))
    return [[bool(entry), True] * DEPTH for entry in attention]


def _by_layer(path: Path) -> list[list[bool]]:
    lists = _lists(2, 2 * DEPTH)
    keys = [f"{kind}-{number}" for kind, number in ORDER]
    path.write_text(json.dumps(dict(zip(keys, lists, strict=True))))
    return [[bool(entries[step]) for entries in lists] for step in range(STEPS)]


def _router(path: Path) -> list[list[bool]]:
    scores = torch.randn(STEPS, 2 * DEPTH, generator=torch.Generator().manual_seed(3)) * 3
    routers = OrderedDict((f"{index}.prob", row.clone()) for index, row in enumerate(scores))
    torch.save({"routers": routers, "opt": {"state": {}}}, path)
    # Evaluations go in pairs, full and routed; the router of evaluation e is number STEPS - 1 - e.
    routed = (torch.sigmoid(scores.flip(0)) > 0.1).tolist()
    return [[True] * (2 * DEPTH) if step % 2 == 0 else routed[step] for step in range(STEPS)]


@pytest.mark.parametrize(
    ("name", "make", "kind"),
    [
        ("kind.json", _by_kind, "smoothcache"),
        ("attn1.json", _attention_only, "smoothcache"),
        ("layer.json", _by_layer, "smoothcache"),
        ("router.pt", _router, "l2c-router"),
    ],
)
def test_every_format_runs_as_its_authors_define_it(
    name: str,
    make: Callable[[Path], list[list[bool]]],
    kind: str,
    shallow: Traced,
    tmp_path: Path,
) -> None:
    rows = make(tmp_path / name)
    schedule = import_schedule(kind, tmp_path / name, shallow.target(STEPS))
    assert [list(row) for row in schedule.gates] == rows
    _check(shallow, schedule, rows, tmp_path / "x")


# --- the released files themselves ---

# name -> steps, variants
RELEASED = {
    "smoothcache-30-N-2-fora.json": (30, 2),
    "smoothcache-50-N-2-l2c.json": (50, 14),
    "smoothcache-50-N-3-threshold-0.18.json": (50, 2),
    "smoothcache-diffuser_schedule.json": (50, 2),
}


def _released(name: str) -> Path:
    path = PUBLISHED / name
    if not path.is_file():
        pytest.skip(f"{name}, as its authors released it, is not here")
    return path


def _rows_of(document: dict[str, list[int]], steps: int) -> list[list[bool]]:
    """The file's own lists, looked up for each layer of DiT-XL/2; a layer without one is computed."""

    def computed(kind: str, number: int, step: int) -> bool:
        names = [f"{kind}-{number}", kind, *(["attn1"] if kind == "attn" else [])]
        return next((bool(document[name][step]) for name in names if name in document), True)

    layers = [(kind, number) for number in range(RELEASED_DEPTH) for kind in ("attn", "mlp")]
    return [[computed(kind, number, step) for kind, number in layers] for step in range(steps)]


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASED)
def test_released_schedules(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path = _released(name)
    steps, variants = RELEASED[name]
    deep: Traced = request.getfixturevalue("deep")
    schedule = import_schedule("smoothcache", path, deep.target(steps))
    rows = _rows_of(json.loads(path.read_text()), steps)
    planned = _check(deep, schedule, rows, tmp_path / "x")
    assert len(planned.plan.variants) == variants == len(set(map(tuple, rows)))
    assert len(planned.plan.launches) == steps


@pytest.mark.slow
def test_the_released_router(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path = _released("l2c-dit-DDIM50_router.pt")
    deep: Traced = request.getfixturevalue("deep")
    schedule = import_schedule("l2c-router", path, deep.target(50))
    with torch.serialization.safe_globals([argparse.Namespace]):
        routers = torch.load(path, map_location="cpu", weights_only=True)["routers"]
    rows = [
        [True] * (2 * RELEASED_DEPTH) if step % 2 == 0 else (torch.sigmoid(routers[f"{49 - step}.prob"]) > 0.1).tolist()
        for step in range(50)
    ]
    planned = _check(deep, schedule, rows, tmp_path / "x")
    assert len(planned.plan.variants) == 14

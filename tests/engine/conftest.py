from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from toy_engine import Toy, build

# Which blocks (k of n) run at which step: few graphs, but of every kind.
KEEP = {
    "fashion-sd": lambda step, k, n: step == 0 or (step == 1 and k in (0, n - 1)) or (step == 2 and k >= n - 2),
    "fashion-dit": lambda step, k, n: step in (0, 3) or (step == 2 and k % 2 == 0),
}
STEPS = 5


@pytest.fixture
def toy_dir(tmp_path: Path) -> Path:
    """A fresh toy engine directory: builds take a fraction of a second."""
    return build(tmp_path / "engine", Toy())


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Engine directories of the embedded models, exported once: ``exported(model, dtype)``."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    torch.set_num_threads(1)
    made: dict[tuple[str, str], Path] = {}

    def get(model: str, dtype: str) -> Path:
        from dipgo_deploy.export.exporter import ExportOptions, export_bundle

        if (model, dtype) not in made:
            folder = tmp_path_factory.mktemp("export") / f"{model}-{dtype}"
            # Whether the graphs compute the right thing is tested where they are made.
            export_bundle(model, schedule_of(model), folder, ExportOptions(layout="variants", dtype=dtype, check=False))
            made[model, dtype] = folder
        return made[model, dtype]

    return get


def schedule_of(model: str):
    from dipgo_deploy.models.location import denoiser_config, resolve_model, scheduler_config
    from dipgo_deploy.sampler import evaluations, make_scheduler
    from dipgo_deploy.schedule.document import Schedule, gate_rows
    from dipgo_deploy.schedule.identity import config_hash

    folder = resolve_model(model)
    family, config = denoiser_config(folder)
    scheduler = make_scheduler("DDIMScheduler", scheduler_config(folder))
    specs = family.blocks(config, "block")
    steps = evaluations(scheduler, STEPS)
    return Schedule(
        model={"class_name": family.class_name, "config_hash": config_hash(config), "granularity": "block"},
        blocks=[{"name": spec.name, "cache": spec.caches[0]} for spec in specs],
        steps=steps,
        keep=gate_rows([[KEEP[model](t, k, len(specs)) for k in range(len(specs))] for t in range(steps)]),
        sampler={
            "class_name": "DDIMScheduler",
            "config": {key: value for key, value in scheduler.config.items() if not key.startswith("_")},
            "num_inference_steps": STEPS,
        },
        provenance={},
    )

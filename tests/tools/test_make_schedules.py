from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dipgo_deploy.models.target import check_sampler, check_schedule
from dipgo_deploy.schedule.document import Schedule
from tools.bench.pairs import SCHEDULES
from tools.make_schedules import KEPT, shipped

NAMES = sorted(path.name for path in SCHEDULES.glob("*.json"))


def model_of(name: str) -> str:
    return "-".join(name.split("-")[:2])


def test_the_shipped_files_are_those_that_the_tool_writes() -> None:
    made = shipped()
    assert sorted(made) == NAMES
    for name, schedule in made.items():
        assert Schedule.load(SCHEDULES / name).to_json() == schedule.to_json(), name


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_schedule_fits_its_built_in_model(name: str) -> None:
    schedule = Schedule.load(SCHEDULES / name)
    check_schedule(schedule, model_of(name))
    check_sampler(schedule)


@pytest.mark.parametrize(("sampler", "evaluations"), [("ddim", 50), ("pndm", 51)])
def test_the_released_pattern(sampler: str, evaluations: int) -> None:
    schedule = Schedule.load(SCHEDULES / f"fashion-sd-{sampler}50.json")
    rows = {step: row for step, row in enumerate(schedule.keep) if "1" in row}
    assert schedule.steps == evaluations
    assert tuple(rows) == KEPT
    dropped = {
        step: [schedule.block_names[k] for k, cell in enumerate(row) if cell == "0"] for step, row in rows.items()
    }
    assert {step: names for step, names in dropped.items() if names} == {7: ["down_blocks.3"]}


def test_with_ddim_the_pattern_is_ddim_on_its_own_timesteps() -> None:
    """The README says so: a prediction that is repeated over steps moves the latent as one longer step does."""
    from dipgo_deploy.sampler import make_scheduler, sampler_matrix

    schedule = Schedule.load(SCHEDULES / "fashion-sd-ddim50.json")
    scheduler = make_scheduler("ddim", schedule.sampler.config)
    source = [sum(step <= t for step in KEPT) - 1 for t in range(schedule.steps)]
    matrix = sampler_matrix(scheduler, schedule.sampler.num_inference_steps, source)

    alphas = scheduler.alphas_cumprod.double().numpy()
    kept = [int(matrix.timesteps[step]) for step in KEPT]
    after = [alphas[t] for t in kept[1:]] + [float(scheduler.final_alpha_cumprod)]
    latent = np.eye(1 + len(KEPT))[0]
    for index, (timestep, alpha_after) in enumerate(zip(kept, after, strict=True)):
        np.testing.assert_allclose(matrix.rows[KEPT[index]], latent, rtol=1e-4, atol=1e-5)
        alpha = alphas[timestep]
        prediction = np.eye(1 + len(KEPT))[1 + index]
        clean = (latent - np.sqrt(1 - alpha) * prediction) / np.sqrt(alpha)
        latent = np.sqrt(alpha_after) * clean + np.sqrt(1 - alpha_after) * prediction
    np.testing.assert_allclose(matrix.final, latent, rtol=1e-4, atol=1e-5)


def test_the_command_writes_every_file(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from tools.make_schedules import main

    result = CliRunner().invoke(main, ["--folder", str(tmp_path / "new")])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == NAMES

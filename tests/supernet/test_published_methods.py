"""One check a mechanism: an imported schedule through the supernet against the method itself, run in PyTorch.

Each method is written here as its authors define it, with state in the modules of a tiny FLUX, or is diffusers' own
hook. Latents are drawn anew at each step: what a step computes depends on them and on what was kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.hooks import (
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
)
from flow_pipelines import T5_WIDTH, flux_transformer
from torch import Tensor, nn

from dipgo_deploy.models.flux import FAMILY
from dipgo_deploy.sampler import sampler_matrix
from dipgo_deploy.sampler.fitted import FittedSolver
from dipgo_deploy.sampler.loop import run_loop
from dipgo_deploy.schedule.builders import Target
from dipgo_deploy.schedule.document import BlockEntry, ModelIdentity, SamplerEntry, Schedule
from dipgo_deploy.schedule.importers.registry import import_schedule
from dipgo_deploy.supernet.gated import CacheState, Supernet

torch.set_num_threads(1)
STEPS = 8
TIMESTEPS = [1000 - 120 * step for step in range(STEPS)]
CONDITIONS = {
    "encoder_hidden_states": torch.randn(1, 3, T5_WIDTH, generator=torch.Generator().manual_seed(1)),
    "pooled_projections": torch.randn(1, 8, generator=torch.Generator().manual_seed(2)),
    "guidance": torch.full((1,), 3.5),
}
LATENTS = torch.randn(STEPS, 1, 4, 4, 4, generator=torch.Generator().manual_seed(3))


def target(granularity: Any, cache: Any) -> Target:
    specs = FAMILY.blocks(flux_transformer().config, granularity)
    return Target(
        model=ModelIdentity(class_name=FAMILY.class_name, config_hash="e" * 64, granularity=granularity),
        blocks=tuple(BlockEntry(name=spec.name, cache=cache) for spec in specs),
        sampler=SamplerEntry(class_name="FlowMatchEulerDiscreteScheduler", config={}, num_inference_steps=STEPS),
        steps=STEPS,
        timesteps=tuple(map(float, TIMESTEPS)),
    )


def imported(kind: str, document: Any, tmp_path: Path, granularity: Any = "layer", cache: Any = "output") -> Schedule:
    path = tmp_path / "given"
    path.write_text(json.dumps(document))
    return import_schedule(kind, path, target(granularity, cache))


def evaluate(model: nn.Module, step: int) -> Tensor:
    with torch.no_grad():
        return FAMILY.call(model, LATENTS[step], torch.tensor([float(TIMESTEPS[step])]), CONDITIONS)


def check(schedule: Schedule, direct: Sequence[Tensor]) -> None:
    """The supernet under the schedule gives what the method gave, and that is not what the full model gives."""
    model = flux_transformer()
    supernet = Supernet(
        model,
        FAMILY.blocks(model.config, schedule.model.granularity),
        [block.cache for block in schedule.blocks],
        FAMILY.call,
    )
    supernet.forecast = schedule.forecast
    state, skipped = CacheState(), 0.0
    for step, expected in enumerate(direct):
        with torch.no_grad():
            made, state = supernet.step(
                LATENTS[step], torch.tensor([float(TIMESTEPS[step])]), CONDITIONS, schedule.gates[step], state, step
            )
        assert (made - expected).abs().max() <= 1e-5 * expected.abs().max(), step
        skipped = max(skipped, float((evaluate(model, step) - expected).abs().max() / expected.abs().max()))
    assert skipped > 1e-3


def test_ecad_on_flux(tmp_path: Path) -> None:
    table = np.random.default_rng(0).random((STEPS, 12)) < 0.4  # the first step too
    names = {"attn": "full_attn", "ff": "full_ff", "ff_context": "full_ff_context"}
    names |= {f"single_{part}": f"single_{part}" for part in ("attn", "proj_mlp", "proj_out")}
    document: dict[str, Any] = {}
    for step, row in enumerate(table):
        blocks: dict[str, Any] = {}
        for cell, (block, component) in zip(
            row,
            [(block, name) for block in ("0", "1") for name in list(names.values())[:3]]
            + [(f"single_{number}", name) for number in "01" for name in list(names.values())[3:]],
            strict=True,
        ):
            blocks.setdefault(block, {})[component] = bool(cell)
        document[f"{step:03}"] = blocks
    schedule = imported("ecad", {"cache_schedule": {"num_blocks": 2, "schedule": document}}, tmp_path)

    model, now = flux_transformer(), {"step": 0}

    def cached(module: nn.Module, block: str, component: str) -> None:
        original, held = module.forward, {}

        def forward(*args: Any, **kwargs: Any) -> Any:
            if document[f"{now['step']:03}"][block][component] or "value" not in held:
                held["value"] = original(*args, **kwargs)
            return held["value"]

        module.forward = forward

    for number in range(2):
        for part in ("attn", "ff", "ff_context"):
            cached(getattr(model.transformer_blocks[number], part), str(number), f"full_{part}")
        for part in ("attn", "proj_mlp", "proj_out"):
            cached(getattr(model.single_transformer_blocks[number], part), f"single_{number}", f"single_{part}")
    direct = []
    for now["step"] in range(STEPS):
        direct.append(evaluate(model, now["step"]))
    check(schedule, direct)


FOCA = -1


class FoCa:
    """The residual of the blocks in between as cache-dit's calibrator estimates it: two anchors, and a window of the
    last two values that estimates go into too."""

    def __init__(self) -> None:
        self.full: list[tuple[int, Tensor]] = []
        self.window: list[Tensor] = []

    def computed(self, step: int, value: Tensor) -> None:
        self.full = [*self.full[-1:], (step, value)]
        self.window = [*self.window[-1:], value]

    def estimated(self, step: int) -> Tensor:
        anchor, elapsed = self.full[-1][1], step - self.full[-1][0]
        if len(self.full) < 2 or len(self.window) < 2:
            return anchor
        slopes = anchor - self.full[0][1] + self.window[1] - self.window[0]
        if elapsed <= 3:
            estimate = anchor + elapsed / 2 * slopes
        else:
            estimate = 3 / elapsed * (anchor + 1.5 * slopes) + (1 - 3 / elapsed) * anchor
        self.window = [self.window[1], estimate]
        return estimate


class DualBlocks(nn.Module):
    """A list of blocks as cache-dit runs it: first ones, the others or their last residual, extrapolated, last ones.

    order: of TaylorSeer; FOCA: that method.
    """

    def __init__(self, blocks: nn.ModuleList, mask: Sequence[int], first: int, last: int, order: int) -> None:
        super().__init__()
        self.foca = (FoCa(), FoCa())
        self.blocks, self.mask, self.edges, self.order = blocks, mask, (first, len(blocks) - last), order
        self.step, self.last = -1, -1
        self.factors: list[list[Tensor]] = [[], []]

    def run(self, blocks: Sequence[nn.Module], hidden: Tensor, text: Tensor, rest: Mapping[str, Any]) -> Any:
        for block in blocks:
            text, hidden = block(hidden_states=hidden, encoder_hidden_states=text, **rest)
        return hidden, text

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **rest: Any) -> Any:
        self.step += 1
        start, end = self.edges
        blocks = list(self.blocks)
        before = self.run(blocks[:start], hidden_states, encoder_hidden_states, rest)
        if self.mask[self.step]:
            after = self.run(blocks[start:end], *before, rest)
            for stream, (new, old) in enumerate(zip(after, before, strict=True)):
                if self.order == FOCA:
                    self.foca[stream].computed(self.step, new - old)
                    continue
                fresh = [new - old]
                for place in range(self.order):
                    if place >= len(self.factors[stream]) or self.step <= 1:
                        break
                    fresh.append((fresh[place] - self.factors[stream][place]) / (self.step - self.last))
                self.factors[stream] = fresh
            self.last = self.step
        elif self.order == FOCA:
            after = tuple(state + foca.estimated(self.step) for state, foca in zip(before, self.foca, strict=True))
        else:
            elapsed = self.step - self.last
            after = tuple(
                state + sum(factor * elapsed**place / math.factorial(place) for place, factor in enumerate(factors))
                for state, factors in zip(before, self.factors, strict=True)
            )
        hidden, text = self.run(blocks[end:], *after, rest)
        return text, hidden


@pytest.mark.parametrize(
    ("first", "last", "order", "mask"),
    [
        (1, 0, 0, [1, 1, 0, 0, 1, 0, 1, 0]),
        (0, 1, 2, [1, 1, 0, 0, 1, 0, 1, 0]),
        (0, 1, 3, [1, 1, 1, 1, 0, 1, 0, 0]),
        (1, 0, FOCA, [1, 0, 1, 0, 0, 1, 0, 0]),
        (0, 0, FOCA, [1, 1, 0, 1, 0, 1, 1, 0]),
        (0, 1, FOCA, [1, 1, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_cache_dit_static_masks(tmp_path: Path, first: int, last: int, order: int, mask: list[int]) -> None:
    config = {"Fn_compute_blocks": first, "Bn_compute_blocks": last, "steps_computation_mask": mask}
    config |= {"steps_computation_policy": "static", "enable_taylorseer": order > 0, "enable_encoder_taylorseer": True}
    config |= {"taylorseer_order": order} if order > 0 else {}
    config |= {"enable_foca": True, "enable_encoder_foca": True} if order == FOCA else {}
    schedule = imported("cache-dit", {"cache_config": config}, tmp_path, "block", "residual")
    model = flux_transformer()
    for name in ("transformer_blocks", "single_transformer_blocks"):
        setattr(model, name, nn.ModuleList([DualBlocks(getattr(model, name), mask, first, last, order)]))
    check(schedule, [evaluate(model, step) for step in range(STEPS)])


def test_magcache_as_diffusers_hook_has_it(tmp_path: Path) -> None:
    ratios = [1.0, 1.05, 0.99, 1.02, 1.01, 0.98, 1.03, 1.0]
    settings = {"mag_ratios": ratios, "threshold": 0.06, "max_skip_steps": 2, "retention_ratio": 0.2}
    schedule = imported("magcache", settings, tmp_path, "block", "residual")
    model = flux_transformer()
    apply_mag_cache(model, MagCacheConfig(**settings, num_inference_steps=STEPS))
    check(schedule, [evaluate(model, step) for step in range(STEPS)])


def test_pab_as_diffusers_hook_has_it(tmp_path: Path) -> None:
    settings = {"spatial_attention_block_skip_range": 3, "spatial_attention_timestep_skip_range": [200, 900]}
    schedule = imported("pab", settings, tmp_path)
    model, now = flux_transformer(), {"step": 0}
    apply_pyramid_attention_broadcast(
        model, PyramidAttentionBroadcastConfig(**settings, current_timestep_callback=lambda: TIMESTEPS[now["step"]])
    )
    direct = []
    for now["step"] in range(STEPS):
        direct.append(evaluate(model, now["step"]))
    check(schedule, direct)


# --- methods on predictions: their loop against the rows of the solver


def loop(predict: Callable[[int, Tensor, float], Tensor], scheduler: Any, steps: int) -> Tensor:
    noise = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return run_loop(scheduler, steps, noise, predict, None).final


def model_of(latent: Tensor, timestep: float) -> Tensor:
    return torch.tanh(latent * (1 + timestep / 1000)) - 0.3 * latent.roll(1, 2) + timestep / 2000


def check_solver(kind: str, document: Any, tmp_path: Path, steps: int, method: Callable[..., Tensor]) -> None:
    """method(step, latent, timestep, sigmas, launch) gives each prediction of the method's own loop."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    fresh = FlowMatchEulerDiscreteScheduler(shift=3.0)
    fresh.set_timesteps(steps)
    made_for = Target(
        model=ModelIdentity(class_name="ZImageTransformer2DModel", config_hash="f" * 64, granularity="block"),
        blocks=(BlockEntry(name="layers.0", cache="residual"),),
        sampler=SamplerEntry(
            class_name="FlowMatchEulerDiscreteScheduler", config=dict(scheduler.config), num_inference_steps=steps
        ),
        steps=steps,
        timesteps=tuple(fresh.timesteps.tolist()),
        matrix=lambda: sampler_matrix(scheduler, steps),
    )
    path = tmp_path / "given"
    path.write_text(json.dumps(document))
    schedule = import_schedule(kind, path, made_for)
    assert schedule.solver is not None
    launched: list[int] = []

    def predict(step: int, latent: Tensor, timestep: float) -> Tensor:
        def launch() -> Tensor:
            launched.append(step)
            return model_of(latent, timestep)

        return method(step, latent, fresh.sigmas.tolist(), launch)

    expected = loop(predict, scheduler, steps)
    made = loop(
        lambda _, latent, timestep: model_of(latent, timestep), FittedSolver(schedule.solver.model_dump()), steps
    )
    assert schedule.steps == len(launched) < steps
    assert (made - expected).abs().max() <= 1e-5 * expected.abs().max()
    plain = loop(lambda _, latent, timestep: model_of(latent, timestep), scheduler, steps)
    assert (plain - expected).abs().max() > 1e-3 * expected.abs().max()


def test_openvino_taylorseer(tmp_path: Path) -> None:
    steps, interval, before, after = 14, 3, 4, -2
    held: dict[str, Any] = {}

    def method(step: int, latent: Tensor, sigmas: Sequence[float], launch: Callable[[], Tensor]) -> Tensor:
        offset = step - max(before, 2)
        compute = (
            offset < 0 or step >= steps + after or (offset >= interval - 1 and (offset - interval + 1) % interval == 0)
        )
        if not compute:
            return held["value"] + held["slope"] * (step - held["step"])
        value = launch()
        if held:
            held["slope"] = (value - held["value"]) / (step - held["step"])
        held.update(value=value, step=step)
        return value

    settings = {"cache_interval": interval, "disable_cache_before_step": before, "disable_cache_after_step": after}
    check_solver("openvino-taylorseer", settings, tmp_path, steps, method)


def test_meancache(tmp_path: Path) -> None:
    calc, steps = [0, 1, 2, 4, 7, 9], 10
    edges = ["chain", "chain", "v_diff_mean_jvp1_s2", "v_diff_mean_jvp1_s5", "v_diff_mean"]
    length = {3: 2, 5: 5, 6: 5, 8: 1}
    log: dict[str, list[Any]] = {"v": [], "before": []}

    def method(step: int, latent: Tensor, sigmas: Sequence[float], launch: Callable[[], Tensor]) -> Tensor:
        log["before"].append(latent)
        if step in calc:
            velocity = launch()
        else:
            first = step - min(length[step], step)
            span = sigmas[step] - sigmas[first]
            average = (latent - log["before"][first]) / span
            slope = (log["v"][first] - average) / span
            velocity = log["v"][-1] - slope * (sigmas[step + 1] - sigmas[step])
        log["v"].append(velocity)
        return velocity

    check_solver("meancache", {"calc": calc, "edges": edges}, tmp_path, steps, method)


def test_spectrum(tmp_path: Path) -> None:
    steps, share, degree, ridge = 20, 0.4, 3, 1.0
    known: list[tuple[float, Tensor]] = []
    state = {"window": 2.0, "cached": 0}

    def method(step: int, latent: Tensor, sigmas: Sequence[float], launch: Callable[[], Tensor]) -> Tensor:
        wait = step < 4 or step >= int(0.9 * steps) or len(known) < 2
        if wait or (state["cached"] + 1) % max(1, math.floor(state["window"])) == 0:
            velocity = launch()
            known.append((step / 50 * 2 - 1, latent - sigmas[step] * velocity))
            del known[: -max(degree + 1, 6)]
            state["window"] += 0.5 if step >= 4 else 0
            state["cached"] = 0
            return velocity
        state["cached"] += 1
        places = np.array([place for place, _ in known])
        table = np.polynomial.chebyshev.chebvander(places, degree)
        stack = torch.stack([value.flatten() for _, value in known]).numpy()
        fitted = np.linalg.solve(table.T @ table + ridge * np.eye(degree + 1), table.T @ stack)
        chebyshev = torch.tensor(np.polynomial.chebyshev.chebvander(np.array([step / 50 * 2 - 1]), degree) @ fitted)
        line = known[-1][1] + 0.5 * (known[-1][1] - known[-2][1])
        denoised = (1 - share) * line + share * chebyshev.reshape(latent.shape)
        return (latent - denoised) / sigmas[step]

    check_solver("spectrum", {"w": share, "m": degree, "lam": ridge}, tmp_path, steps, method)


class Hidden(nn.Module):
    """FLUX's single blocks as Spectrum's authors run them: all, or a fit of what the last one gave for the picture."""

    def __init__(self, model: nn.Module, settings: Mapping[str, float]) -> None:
        super().__init__()
        self.blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
        self.split = len(model.transformer_blocks)
        self.settings, self.window = settings, settings["window_size"]
        self.step, self.skipped = -1, 0
        self.known: list[tuple[int, Tensor]] = []

    def forward(self, hidden: Tensor, text: Tensor, rest: Mapping[str, Any]) -> Tensor:
        self.step += 1
        given = self.settings
        if self.step >= given["warmup_steps"] and (self.skipped + 1) % math.floor(self.window):
            self.skipped += 1
            return self.fitted()
        if self.step >= given["warmup_steps"]:
            self.window = round(self.window + given["flex_window"], 3)
        self.skipped = 0
        for block in self.blocks:
            text, hidden = block(hidden_states=hidden, encoder_hidden_states=text, **rest)
        self.known.append((self.step, hidden))
        return hidden

    def fitted(self) -> Tensor:
        degree, ridge, share = int(self.settings["m"]), self.settings["lam"], self.settings["w"]

        def basis(steps: Sequence[int]) -> np.ndarray:
            return np.polynomial.chebyshev.chebvander((np.array(steps) - 25.0) * 2 / 50, degree)

        table = basis([step for step, _ in self.known])
        stack = torch.stack([value.flatten() for _, value in self.known]).double().numpy()
        fit = np.linalg.solve(table.T @ table + ridge * np.eye(degree + 1), table.T @ stack)
        chebyshev = torch.from_numpy(basis([self.step]) @ fit).float()
        (earlier, older), (latest, value) = self.known[-2:]
        line = value + (self.step - latest) / (latest - earlier) * (value - older)
        return (1 - share) * line + share * chebyshev.reshape(value.shape)


def test_spectrum_on_features(tmp_path: Path) -> None:
    settings = {"w": 0.5, "m": 2, "lam": 0.1, "window_size": 2, "flex_window": 0.75, "warmup_steps": 3}
    schedule = imported("spectrum-features", settings, tmp_path, "block", "output")
    assert [all(row) for row in schedule.gates] == [True, True, True, False, True, False, True, False]
    assert schedule.forecast.terms == 5  # the fit is to all that was computed
    model = flux_transformer()
    hidden = Hidden(model, settings)

    class First(nn.Module):
        """In the place of all blocks: the first list's first one runs them."""

        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **rest: Any) -> Any:
            return encoder_hidden_states, hidden(hidden_states, encoder_hidden_states, rest)

    model.transformer_blocks = nn.ModuleList([First()])
    model.single_transformer_blocks = nn.ModuleList([])
    check(schedule, [evaluate(model, step) for step in range(STEPS)])

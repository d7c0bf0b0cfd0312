"""The same cached loop by every means at hand, in one run: PyTorch, DeepCache, cache-dit, ONNX Runtime, and ours.

Run from the repository's root: ``python -m tools.bench.peers --collect docs/results/peers.json``. DeepCache, cache-dit,
OpenVINO and its GenAI package are taken where they are installed (``pip install DeepCache cache-dit openvino
openvino-genai``), torch.compile where there is a C++ compiler; what is missing is named in the results. A name of
``tools.full_size`` is a model that is made with random weights: ``--model sd-1.5-512 --height 256 --work FOLDER``.
"""

from __future__ import annotations

import copy
import gc
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import torch

from dipgo_deploy.cli.common import emit, entry_point, human_console, json_option
from dipgo_deploy.difference import relative_error
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import ExportOptions, PlannedExport, plan_export
from dipgo_deploy.models.location import BUILT_IN
from dipgo_deploy.models.target import schedule_target
from dipgo_deploy.reference.conditions import as_arrays, reference_inputs
from dipgo_deploy.reference.quiet import quiet_libraries
from dipgo_deploy.runtime.loop import DenoisingLoop
from dipgo_deploy.sampler.schedulers import fresh, set_timesteps
from dipgo_deploy.schedule import builders
from dipgo_deploy.schedule.built_in import built_in_schedules
from dipgo_deploy.schedule.document import Granularity, Schedule
from dipgo_deploy.supernet.loop import run_loop
from tools.bench.measure import machine, machine_line, spread, timed
from tools.bench.pairs import full_schedule, write_engine
from tools.bench.tables import table, with_earlier, with_quartiles, write_results

GUIDANCE_SCALE = 5.0
_PATH = click.Path(path_type=Path)

Denoise = Callable[[], np.ndarray]
"""One whole loop: the final latents (1, C, h, w)."""


@dataclass(frozen=True)
class Contest:
    """What everybody computes: one image with guidance, the same noise and conditions, ``interval`` steps a refresh.

    ours: the schedule that is equal to the peer's setting. peer: name of the rival it was made for.
    """

    model: str
    schedule: Schedule
    planned: PlannedExport
    latents: torch.Tensor
    conditions: Mapping[str, torch.Tensor]
    interval: int
    peer: str

    @property
    def steps(self) -> int:
        """Steps of the sampler."""
        return self.schedule.sampler.num_inference_steps


def contest(model: str, steps: int, interval: int, height: int | None) -> Contest:
    """DeepCache's pattern (branch 0) for a UNet; for a transformer cache-dit's: the first block always, the others
    every ``interval`` steps, their summed change kept between."""
    probe = schedule_target(model, "ddim", steps)
    unet = probe.model.class_name.startswith("UNet")
    granularity: Granularity = "layer" if unet else "block"
    target = schedule_target(model, "ddim", steps, granularity)
    names = [block.name for block in target.blocks]
    if unet:
        gates = builders.deepcache(target.steps, names, interval, 0)
    else:
        gates = tuple(
            tuple(step % interval == 0 or index == 0 for index in range(len(names))) for step in range(target.steps)
        )
    schedule = target.schedule(gates, "bench", {"interval": interval})
    # Not with low memory: the supernet runs on the same weights afterwards.
    options = ExportOptions(
        layout="variants", components=False, check=False, height=height, width=height, low_memory=False
    )
    planned = plan_export(model, schedule, options)
    shape = planned.traced.shape
    channels = planned.source.family.latent_channels(planned.source.config)
    inputs = reference_inputs(
        planned.source,
        planned.traced.conditions,
        (1, channels, shape.height, shape.width),
        noises=0,
        guidance=True,
        guidance_scale=GUIDANCE_SCALE,
    )
    peer = "DeepCache" if unet else "cache-dit"
    return Contest(model, schedule, planned, inputs.latents, inputs.conditions, interval, peer)


def torch_loop(given: Contest, model: Any, scheduler: Any) -> np.ndarray:
    """What a diffusers pipeline does between text encoder and VAE."""
    latents = given.latents * scheduler.init_noise_sigma
    channels = latents.shape[1]
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            batch = torch.cat([latents] * 2)
            times = timestep if given.peer == "DeepCache" else timestep.expand(2)
            output = model(scheduler.scale_model_input(batch, timestep), times, return_dict=False, **given.conditions)
            unconditional, conditional = output[0][:, :channels].chunk(2)
            prediction = unconditional + GUIDANCE_SCALE * (conditional - unconditional)
            latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
    result: np.ndarray = latents.numpy()
    return result


def twin(given: Contest) -> Any:
    """The model in PyTorch, with the parameters that all contestants in PyTorch have in common: copies of a large one
    would push mapped weights out of memory."""
    model = given.planned.source.denoiser
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def eager(given: Contest) -> Denoise:
    """diffusers' model as it is, every step in full."""
    model = twin(given)
    return lambda: torch_loop(given, model, _scheduler(given))


def compiled(given: Contest) -> Denoise:
    """The same through ``torch.compile``; compiling is not counted."""
    model = torch.compile(twin(given), dynamic=False)
    return lambda: torch_loop(given, model, _scheduler(given))


def eager_cached(given: Contest) -> Denoise:
    """The schedule in PyTorch: the supernet, removed blocks not run."""
    supernet = given.planned.source.supernet(given.schedule.model.granularity, given.schedule.cache_kinds)

    def call() -> np.ndarray:
        with torch.no_grad():
            final = run_loop(
                supernet,
                given.planned.scheduler,
                given.schedule.gates,
                given.latents,
                given.conditions,
                num_inference_steps=given.steps,
                guidance_scale=GUIDANCE_SCALE,
                set_timesteps_kwargs=given.planned.set_timesteps,
            )
        result: np.ndarray = final.numpy()
        return result

    return call


def deepcache(given: Contest) -> Denoise:
    """The package DeepCache, ``cache_branch_id`` 0."""
    if given.peer != "DeepCache":
        raise UserError("it patches the blocks of a UNet, and this is a transformer")
    from DeepCache import DeepCacheSDHelper

    pipe = SimpleNamespace(unet=twin(given), scheduler=None)
    helper = DeepCacheSDHelper(pipe)
    helper.set_params(cache_interval=given.interval, cache_branch_id=0)

    def call() -> np.ndarray:
        pipe.scheduler = _scheduler(given)
        helper.enable()
        try:
            return torch_loop(given, pipe.unet, pipe.scheduler)
        finally:
            helper.disable()

    return call


def cache_dit(given: Contest) -> Denoise:
    """The package cache-dit: first block computed, the others from a static mask of steps."""
    if given.peer != "cache-dit":
        raise UserError("it takes transformers, not UNet2DConditionModel")
    import cache_dit as package

    model = twin(given)
    mask = [int(step % given.interval == 0) for step in range(given.steps)]
    config = package.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=1,
        num_inference_steps=given.steps,
        steps_computation_mask=mask,
        steps_computation_policy="static",
        enable_separate_cfg=False,
    )
    package.enable_cache(model, cache_config=config)

    def call() -> np.ndarray:
        package.refresh_context(model, num_inference_steps=given.steps)
        return torch_loop(given, model, _scheduler(given))

    return call


def genai(given: Contest, folder: Path, threads: int) -> Denoise:
    """The UNet of OpenVINO's GenAI package, every step in full."""
    from tools.bench.openvino_peers import GenAiUNet

    model = given.planned.source.denoiser
    batch = torch.cat([given.latents] * 2)
    unet = GenAiUNet(model, batch, given.conditions.get("encoder_hidden_states", batch), folder / "genai", threads)
    return lambda: torch_loop(given, unet, _scheduler(given))


def stable_diffusion_cpp() -> Denoise:
    """See there."""
    from tools.bench.openvino_peers import stable_diffusion_cpp as missing

    found: Denoise = missing()
    return found


def engine(given: Contest, schedule: Schedule, folder: Path, threads: int, backend: str = "cpu") -> Denoise:
    """An engine directory of ours on a backend of the CPU, exported where it is not there yet."""
    from dipgo_deploy.backends import create_backend
    from dipgo_deploy.bundle.directory import Bundle
    from dipgo_deploy.export.exporter import replan

    created = create_backend(backend, threads=threads)
    if not folder.is_dir():
        same = schedule.blocks == given.schedule.blocks
        write_engine(
            replan(given.planned, schedule) if same else plan_export(given.model, schedule, given.planned.options),
            folder,
        )
    loop = DenoisingLoop(Bundle.open(folder), created)
    noise, conditions = given.latents.numpy(), as_arrays(given.conditions)
    return lambda: loop.run(noise, conditions, guidance_scale=GUIDANCE_SCALE)


OURS = "ours"
FULL_ENGINE = "ONNX Runtime, full"
FULL = ("PyTorch, full", "torch.compile, full", FULL_ENGINE, "OpenVINO, full", "OpenVINO GenAI, full")


def calibrated_name(schedule: Schedule) -> str:
    """Of a calibrated schedule in the table."""
    return f"ours, calibrated, {schedule.steps} launches"


def rivals(
    given: Contest, folder: Path, threads: int, calibrated: Schedule | None
) -> list[dict[str, Callable[[], Denoise]]]:
    """Every contestant by name, made when it is asked for, in groups that are in memory together; the first of each
    group is what the others are measured against."""
    own = {OURS: lambda: engine(given, given.schedule, folder / "ours", threads)}
    fewer: dict[str, Callable[[], Denoise]] = {}
    if calibrated is not None:
        name, place = calibrated_name(calibrated), folder / "calibrated"
        fewer = {
            name: lambda: engine(given, calibrated, place, threads),
            f"{name}, OpenVINO": lambda: engine(given, calibrated, place, threads, "openvino"),
        }
    return [
        {
            **own,
            "PyTorch, same caching": lambda: eager_cached(given),
            "DeepCache": lambda: deepcache(given),
            "cache-dit": lambda: cache_dit(given),
            "PyTorch, full": lambda: eager(given),
            FULL_ENGINE: lambda: engine(given, full_schedule(given.schedule), folder / "full", threads),
            "torch.compile, full": lambda: compiled(given),  # the last: compiling takes minutes
        },
        {
            **own,
            "stable-diffusion.cpp, full": stable_diffusion_cpp,
            "ours, OpenVINO": lambda: engine(given, given.schedule, folder / "ours", threads, "openvino"),
            **fewer,
            "OpenVINO, full": lambda: engine(
                given, full_schedule(given.schedule), folder / "full", threads, "openvino"
            ),
            "OpenVINO GenAI, full": lambda: genai(given, folder, threads),
        },
    ]


def race(
    given: Contest,
    repeats: int,
    threads: int,
    leave_out: tuple[str, ...],
    notify: Callable[[str], None],
    engines: Path | None = None,
    minutes: float = 10,
    calibrated: tuple[Schedule, Mapping[str, float]] | None = None,
) -> Any:
    """Everybody in turn, ``repeats`` rounds; agreement of the final latents within the cached and the full ones.

    minutes: after them no contestant is made and no round begins. calibrated: a schedule of ours with fewer launches,
    and the SSIM of each to the full run's pictures, by name.
    """
    torch.set_num_threads(threads)
    end = time.monotonic() + 60 * minutes
    rows: dict[str, dict[str, Any]] = {}
    fewer, ssim = calibrated or (None, {})
    full: np.ndarray | None = None
    with tempfile.TemporaryDirectory() as folder:
        groups = rivals(given, engines or Path(folder), threads, fewer)
        for place, group in enumerate(groups):
            calls: dict[str, Denoise] = {}
            latents: dict[str, np.ndarray] = {}
            # Half of what is left, for each group, goes to preparing.
            share = (end - time.monotonic()) / (len(groups) - place)
            prepared = time.monotonic() + share / 2
            for name, make in group.items():
                if name in leave_out:
                    rows[name] = {"missing": "left out"}
                    continue
                if time.monotonic() > prepared and calls:
                    rows[name] = {"missing": f"no time left of {minutes:g} minutes"}
                    continue
                notify(f"{given.model}: preparing {name}")
                start = time.perf_counter()
                try:
                    call = make()
                    latents[name] = call()
                    calls[name] = call
                except Exception as error:  # a peer that is missing or fails is a result, too
                    if name == OURS:
                        raise
                    rows[name] = {"missing": " ".join(str(error).split())[:200] or type(error).__name__}
                    continue
                rows.setdefault(name, {"ready_seconds": time.perf_counter() - start})
            notify(f"{given.model}: {repeats} rounds of {', '.join(calls)}")
            rounds: list[dict[str, float]] = []
            while len(rounds) < repeats and (not rounds or time.monotonic() < prepared + share / 2):
                rounds.append({name: timed(call)() for name, call in calls.items()})
            full = latents.get(FULL_ENGINE, full)
            for name in calls:
                seconds = np.array([one[name] for one in rounds])
                against = full if name in FULL else latents[OURS]
                rows[name] |= {
                    "rounds": len(rounds),
                    "seconds": spread(seconds),
                    "times_ours": spread(seconds / np.array([one[OURS] for one in rounds])),
                    "relative_error": None
                    if against is None or name.startswith("ours, calibrated")
                    else relative_error(latents[name], against),
                }
            del calls
            gc.collect()
    for name, value in ssim.items():
        if "missing" not in rows[name]:
            rows[name]["ssim"] = value
    shape = given.planned.traced.shape
    return {
        "model": Path(given.model).name,
        "machine": machine(threads),
        "repeats": repeats,
        "steps": given.steps,
        "interval": given.interval,
        "latent": [shape.height, shape.width],
        "graphs": len(given.planned.plan.variants),
        "macs_full_over_run": given.planned.plan.macs_full * given.steps / given.planned.plan.macs_run,
        "rows": rows,
    }


@click.command(name="peers")
@click.option(
    "--model",
    "models",
    multiple=True,
    help="Built-in model, folder, or a name of tools.full_size.  [default: built-in]",
)
@click.option("--work", type=_PATH, help="Folder for models of tools.full_size: kept there, and used again.")
@click.option("--minutes", type=float, default=10, show_default=True, help="Of each model, beside the first trace.")
@click.option("--steps", type=click.IntRange(min=2), default=50, show_default=True)
@click.option("--interval", type=click.IntRange(min=2), default=5, show_default=True, help="Steps a refresh.")
@click.option("--height", type=int, help="Pixels, square.  [default: the model's own]")
@click.option("--repeats", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--leave-out", multiple=True, help="Contestant that does not run (by its name in the table).")
@click.option(
    "--engines",
    type=_PATH,
    help="Folder of our engine directories: kept there, and used again. One model, and the same steps, only.",
)
@click.option("--collect", type=_PATH, help="Add to this file (.json), with a table for readers beside it.")
@json_option
def command(
    models: tuple[str, ...],
    steps: int,
    interval: int,
    height: int | None,
    repeats: int,
    threads: int,
    leave_out: tuple[str, ...],
    engines: Path | None,
    collect: Path | None,
    as_json: bool,
    work: Path | None,
    minutes: float,
) -> None:
    """Time one cached denoising loop by every means at hand, in turn."""
    if engines is not None and len(models) != 1:
        raise UserError("--engines: holds the engine directories of one model; give one --model")
    quiet_libraries()
    console = human_console(as_json)
    results = []
    for model in models or ("fashion-sd", "fashion-dit"):
        given = contest(model_of(model, work, console.print), steps, interval, height)
        console.print(f"{model}: pictures of calibrated schedules", markup=False)
        fewer = same_quality(given) if model in BUILT_IN and steps == 50 else None
        results.append(race(given, repeats, threads, leave_out, console.print, engines, minutes, fewer))
        console.print(_table(results[-1]), markup=False, soft_wrap=True)
    if collect is not None:
        rows = with_earlier(collect, results, _key)
        write_results(collect, rows, as_text(rows))
    emit({"contests": results}, as_json)


main = entry_point(command)


def model_of(name: str, work: Path | None, say: Callable[[str], None]) -> str:
    """A built-in model or a folder as it is; one of ``tools.full_size``, made in ``work`` where it is not there yet.

    Raises:
        UserError: ``work`` is missing for it.
    """
    from tools.full_size import find, models
    from tools.full_size.export import model_folder

    if name not in models():
        return name
    if work is None:
        raise UserError(f"--model {name}: is made with random weights; give --work, a folder for it")
    work.mkdir(parents=True, exist_ok=True)
    folder = work / f"{name}-fp32"
    model_folder(find(name), {}, "fp32", folder, work / f"{name}.log", say)
    return str(folder)


def same_quality(given: Contest, per_condition: int = 4) -> tuple[Schedule, dict[str, float]] | None:
    """The shipped calibrated schedule with the fewest launches whose pictures are as close to the full run's as those
    of the contest's schedule, which are its peers', too; and the mean SSIM of both, by name in the table."""
    from dipgo_deploy.bench.quality import measure, schedule_cases
    from dipgo_deploy.search.problem import ProblemOptions, load_problem

    known = built_in_schedules()
    prefix = f"{given.model}-ddim50-"
    files = [file for name, file in known.items() if name.startswith(prefix) and file.parent.stem == "calibrated"]

    def ssim(schedule: Schedule, granularity: Granularity) -> float:
        options = ProblemOptions(
            given.model, sampler="ddim", steps=given.steps, granularity=granularity, guidance_scale=GUIDANCE_SCALE
        )
        problem = load_problem(options)
        (row,) = measure(problem, schedule_cases([("one", schedule)], problem, any_cache=True), per_condition)
        return float(row.ssim.value)

    least = ssim(given.schedule, given.schedule.model.granularity)
    for schedule in sorted(map(Schedule.load, files), key=lambda one: one.steps):
        value = ssim(schedule, schedule.model.granularity)
        if value >= least:
            name = calibrated_name(schedule)
            return schedule, {OURS: least, given.peer: least, name: value, f"{name}, OpenVINO": value}
    return None


def _key(result: Mapping[str, Any]) -> list[Any]:
    return [result[name] for name in ("model", "latent", "steps", "interval")] + [result["machine"]["threads"]]


def as_text(results: Sequence[Mapping[str, Any]]) -> str:
    """The results for readers."""
    parts = [
        "# Against peers\n",
        "One image with guidance, DDIM, fp32, the same noise and conditions; seconds of the denoising loop alone, in "
        "rounds in which every contestant runs once, in turn; in two groups, because all of a large model's would not "
        "fit in memory. Median, quartiles in brackets. `times ours` is round by round. `error`: of the final latents, "
        "relative to the largest value, for the cached loops against ours and for the full ones against ONNX "
        "Runtime's. `SSIM`: of the pictures to the full run's, for the two built-in models; the calibrated schedule is "
        "the one with the fewest launches that is no worse than the peer. Made by `python -m tools.bench.peers`.\n",
    ]
    for result in results:
        height, width = result["latent"]
        parts.append(
            f"## {result['model']}, {height}x{width} latents, {result['steps']} steps, "
            f"refreshed every {result['interval']}\n\n{machine_line(result['machine'])}.\n\n"
            f"{result['graphs']} graphs; the full loop has {result['macs_full_over_run']:.2f} times the "
            f"multiply-accumulates. At most {result['repeats']} rounds.\n"
        )
        parts.append(_table(result))
    return "\n".join(parts)


def _table(result: Mapping[str, Any]) -> str:
    rows = []
    for name, row in result["rows"].items():
        if "missing" in row:
            rows.append((name, "-", "-", "-", "-", row["missing"]))
            continue
        rows.append(
            (
                name,
                with_quartiles(row["seconds"], 3),
                with_quartiles(row["times_ours"], 2),
                "-" if row["relative_error"] is None else f"{row['relative_error']:.1e}",
                f"{row['ssim']:.4f}" if "ssim" in row else "-",
                "",
            )
        )
    return table(("loop", "seconds", "times ours", "error", "SSIM", "not run because"), rows)


def _scheduler(given: Contest) -> Any:
    scheduler = fresh(given.planned.scheduler)
    set_timesteps(scheduler, given.steps, given.planned.set_timesteps)
    return scheduler


if __name__ == "__main__":
    raise SystemExit(main(None))

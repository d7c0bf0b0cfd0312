"""What a search works on: the model in torch, its sampler, its costs, and the images it is judged on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dipgo_deploy.errors import UserError
from dipgo_deploy.export.trace import TracedModel, trace
from dipgo_deploy.models.family import CacheKind, Granularity
from dipgo_deploy.models.location import denoiser_config, pipeline_index
from dipgo_deploy.models.shape import TraceShape
from dipgo_deploy.models.target import schedule_target
from dipgo_deploy.plan.graph import BlockGraph
from dipgo_deploy.reference.conditions import DEFAULT_GUIDANCE_SCALE, reference_conditions
from dipgo_deploy.reference.source import Source, load_source
from dipgo_deploy.reference.vae import decoded
from dipgo_deploy.runtime.noise import TorchNoise
from dipgo_deploy.sampler import make_scheduler, prediction_used, sampler_matrix, scheduler_of
from dipgo_deploy.sampler.matrix import SamplerMatrix
from dipgo_deploy.schedule.builders import Target
from dipgo_deploy.schedule.document import BlockEntry, SamplerEntry, Schedule
from dipgo_deploy.schedule.forecast import Reads
from dipgo_deploy.search.costs import Costs
from dipgo_deploy.search.prompts import built_in_prompts, check_labels, class_count, known_labels, read_prompts
from dipgo_deploy.search.samples import Pair as Pair
from dipgo_deploy.supernet import Evaluation, Gate, Supernet, run_loop

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProblemOptions:
    """What is pruned, and how images are made while it is.

    Attributes:
        model, sampler, steps, granularity, cache: as for a schedule.
        height, width: pixels, None the model's own.
        num_frames: of the video, of a model of videos; None as many as its pipeline makes.
        guidance_scale: None the pipeline's own.
        guidance: whether there is any, None as the pipeline has it.
        prompts: a text file.
        class_labels: for a class-conditioned model, None all that the model names.
        reference: sampler and steps of the full run whose images are to be kept and whose cost is to be saved of, None
            for that of sampler and steps.
        guidance_gates: whether a search decides which evaluations are conditional only.
        random_conditions: of a denoiser without its pipeline, what stands for a prompt is noise: enough to measure time
            and memory, and for nothing else.
    """

    model: str
    sampler: str | None = None
    steps: int = 50
    granularity: Granularity = "block"
    cache: CacheKind | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    guidance: bool | None = None
    guidance_scale: float | None = None
    prompts: str | None = None
    class_labels: tuple[int, ...] | None = None
    reference: tuple[str, int] | None = None
    device: str = "cpu"
    guidance_gates: bool = False
    random_conditions: bool = False


@dataclass(frozen=True)
class Batch:
    """Inputs of a denoising loop: latents (B, C, h, w) unit noise, the sampler's draws, and conditions (G*B, ...)."""

    latents: Tensor
    noises: tuple[Tensor, ...]
    conditions: dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """A model to be pruned.

    Attributes:
        target: what a schedule for it says.
        conditions: one set of forward inputs a prompt or class, each (G, ...), the unconditional row first.
        names: of the conditions.
        matrix: the sampler as a matrix.
        traced: the model's one trace.
        sample_shape: (C, [f,] h, w).
        set_timesteps: what the scheduler's ``set_timesteps`` gets besides the number of steps.
        reference: the same model and images with the sampler of the full run that images are compared with, None for
            its own; costs are shares of that run's.
    """

    options: ProblemOptions
    source: Source
    supernet: Supernet
    scheduler: Any
    target: Target
    matrix: SamplerMatrix
    traced: TracedModel
    costs: Costs
    conditions: tuple[dict[str, Tensor], ...]
    names: tuple[str, ...]
    guidance_scale: float | None
    sample_shape: tuple[int, ...]
    set_timesteps: Mapping[str, Any] = field(default_factory=dict)
    reference: Problem | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def steps(self) -> int:
        """T."""
        return self.target.steps

    @property
    def cache_kinds(self) -> dict[str, CacheKind]:
        """Block name -> kind of cache."""
        return {block.name: block.cache for block in self.target.blocks}

    @property
    def can_decode(self) -> bool:
        """Whether there is a VAE, or a model on pixels, so that losses on images are possible."""
        return self.source.family.pixels or getattr(self.source.pipeline, "vae", None) is not None

    def batch(self, pairs: Sequence[Pair]) -> Batch:
        """The inputs of these images, on the problem's device."""
        draws = [_draws(pair.seed, self.sample_shape, 1 + self.matrix.noises) for pair in pairs]
        stacked = [torch.stack([draw[place] for draw in draws]).to(self.device) for place in range(len(draws[0]))]
        return Batch(stacked[0], tuple(stacked[1:]), self.conditions_of(pairs))

    def conditions_of(self, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        """The conditions of these images, (G*B, ...) by name, on the problem's device."""
        rows = [self.conditions[pair.condition] for pair in pairs]
        halves = range(1 if self.guidance_scale is None else 2)
        return {
            name: torch.cat([row[name][half : half + 1] for half in halves for row in rows]).to(self.device)
            for name in self.conditions[0]
        }

    def run(
        self,
        batch: Batch,
        gates: Sequence[Sequence[Gate]] | Tensor,
        supernet: Supernet | None = None,
        *,
        record: Callable[[Evaluation], None] | None = None,
        keep: Callable[[int], Collection[str]] | None = None,
    ) -> Tensor:
        """Final latents (B, C, h, w) of these images under T x N gates; see `run_loop`. supernet: None the own one."""
        return run_loop(
            supernet or self.supernet,
            self.scheduler,
            gates,
            batch.latents,
            batch.conditions,
            num_inference_steps=self.options.steps,
            guidance_scale=self.guidance_scale,
            noises=batch.noises,
            set_timesteps_kwargs=self.set_timesteps,
            record=record,
            keep=keep,
        )

    def decode(self, latents: Tensor) -> Tensor:
        """Final latents (B, C, [f,] h, w) as images (B, 3, [F,] H, W), about 0 to 1, not clamped; differentiable."""
        if self.source.family.pixels:
            pixels = latents / 2 + 0.5
            return pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
        assert self.source.pipeline is not None
        vae = self.source.pipeline.vae
        images: Tensor = decoded(vae, latents)
        return images / 2 + 0.5

    def check_loss(self, name: str) -> None:
        """Refuse (UserError) a loss on images for a model that makes none."""
        if name.startswith("latent"):
            return
        if self.source.time_scale is not None:
            raise UserError(f"--loss {name}: compares pictures, and {self.options.model} makes videos; use latent-l2")
        if not self.can_decode:
            raise UserError(f"--loss {name}: {self.options.model} has no VAE to make images with; use latent-l2")


Notify = Callable[[str], None]


def _shape(source: Source, options: ProblemOptions) -> TraceShape:
    """What one image or video is traced at."""
    return source.trace_shape(
        batch=1,
        guidance=bool(options.guidance),
        height=options.height,
        width=options.width,
        num_frames=options.num_frames,
    )


def load_problem(options: ProblemOptions, notify: Notify = lambda stage: None) -> Problem:
    """Load a model, trace it once for its costs, and encode what it is to draw.

    Raises:
        UserError: no such model or sampler, an empty prompts file, a class the model does not have, or a text model
            without prompts.
    """
    target = schedule_target(options.model, options.sampler, options.steps, options.granularity, options.cache)
    if target.denoisers:
        several = " and ".join(dict.fromkeys(target.denoisers))
        raise UserError(
            f"{options.model}: runs {several} in turn, which is neither searched, fitted nor measured here; make a "
            "schedule by a rule (dipgo-schedule uniform), or import one"
        )
    _check_guidance_gates(options)
    prompts = _prompts(options)
    device = _device(options.device)
    notify("loading the model")
    source = load_source(options.model)
    guidance = source.guided if options.guidance is None else options.guidance
    options = replace(options, guidance=guidance)
    names, labels = _names_and_labels(options, source, prompts)
    shape = _shape(source, options)
    specs = source.family.blocks(source.config, options.granularity)
    kinds = {block.name: block.cache for block in target.blocks}
    notify("tracing the denoiser")
    traced = trace(source.denoiser, source.family, source.config, specs, kinds, shape, "fp32")
    notify("preparing the search")
    scheduler = make_scheduler(target.sampler.class_name, target.sampler.config)
    set_timesteps = source.set_timesteps(scheduler, shape.extents, options.steps)
    matrix = sampler_matrix(scheduler, options.steps, set_timesteps_kwargs=set_timesteps)
    scale = options.guidance_scale if options.guidance_scale is not None else source.default_guidance_scale()
    conditions = _encoded(source, traced, guidance, names, labels, scale)
    for module in (source.denoiser, getattr(source.pipeline, "vae", None)):
        if module is not None:
            module.requires_grad_(False).eval().to(device)
    problem = Problem(
        options=replace(options, device=str(device)),
        source=source,
        supernet=source.supernet(options.granularity, kinds),
        scheduler=scheduler,
        target=target,
        matrix=matrix,
        traced=traced,
        costs=Costs(traced.graph, target.steps, prediction_used(matrix), guidance_gates=options.guidance_gates),
        conditions=conditions,
        names=names,
        guidance_scale=(scale or DEFAULT_GUIDANCE_SCALE) if guidance else None,
        sample_shape=(source.family.latent_channels(source.config), *shape.extents),
        set_timesteps=set_timesteps,
        device=device,
    )
    return problem if options.reference is None else with_reference(problem, *options.reference)


def with_sampler(problem: Problem, sampler: str, steps: int, config: Mapping[str, Any] | None = None) -> Problem:
    """The same model and images with another sampler, whose own full run is the reference.

    config: of the scheduler ``sampler``, as a schedule has it; None sets it up from the model's as diffusers users swap
    them.

    Raises:
        UserError: an unknown sampler, or one whose steps are not linear.
    """
    options = replace(problem.options, sampler=sampler, steps=steps)
    target = schedule_target(options.model, sampler, steps, options.granularity, options.cache)
    if config is not None:
        entry = SamplerEntry(class_name=target.sampler.class_name, config=dict(config), num_inference_steps=steps)
        target = replace(target, sampler=entry)
    return _with_scheduler(problem, make_scheduler(target.sampler.class_name, target.sampler.config), target, options)


def _with_scheduler(problem: Problem, scheduler: Any, target: Target, options: ProblemOptions) -> Problem:
    """Without a reference of its own, and without a forecast or guidance, which are of another T. target: but for T,
    which the scheduler decides."""
    problem = _with_reads(problem, None, None)
    set_timesteps = problem.source.set_timesteps(scheduler, problem.sample_shape[1:], options.steps)
    matrix = sampler_matrix(scheduler, options.steps, set_timesteps_kwargs=set_timesteps)
    return replace(
        problem,
        options=replace(options, reference=None),
        scheduler=scheduler,
        target=replace(target, steps=len(matrix.timesteps)),
        matrix=matrix,
        set_timesteps=set_timesteps,
        reference=None,
        costs=Costs(
            problem.traced.graph,
            len(matrix.timesteps),
            prediction_used(matrix),
            guidance_gates=options.guidance_gates,
        ),
    )


def with_reference(problem: Problem, sampler: str, steps: int) -> Problem:
    """The same problem, to keep the images of another sampler's full run and to save of its cost.

    Raises:
        UserError: an unknown sampler, or one whose steps are not linear.
    """
    reference = with_sampler(problem, sampler, steps)
    return replace(
        problem,
        options=replace(problem.options, reference=(sampler, steps)),
        reference=reference,
        costs=costs_of(replace(problem, reference=reference), problem.traced.graph),
    )


def costs_of(problem: Problem, graph: BlockGraph) -> Costs:
    """What gates of the problem's evaluations cost on this graph, as shares of the reference's full run."""
    steps = None if problem.reference is None else problem.reference.steps
    net = problem.supernet
    return Costs(
        graph,
        problem.steps,
        prediction_used(problem.matrix),
        reference_steps=steps,
        forecast=net.forecast,
        guidance=net.guidance,
        guidance_gates=problem.options.guidance_gates,
    )


def sampler_and_steps(text: str, option: str, steps: int | None = None) -> tuple[str, int]:
    """``ddim:10`` as a sampler's name and its steps. option: what messages call it. steps: where none are written.

    Raises:
        UserError: it is not written so.
    """
    name, colon, number = text.partition(":")
    if name and not colon and steps is not None:
        return name, steps
    if not name or not number.isdigit() or int(number) < 1:
        raise UserError(f"{option} {text}: give a sampler and its steps, as in ddim:10")
    return name, int(number)


def cache_kinds(problem: Problem) -> tuple[CacheKind, ...]:
    """The kinds of cache that every block of the model can have, the family's default first."""
    specs = problem.supernet.specs
    return tuple(kind for kind in specs[0].caches if all(kind in spec.caches for spec in specs))


def with_schedule(problem: Problem, schedule: Schedule) -> Problem:
    """The same model and images with a schedule's own sampler or fitted solver, its kinds of cache, its forecast and
    its guidance.

    Raises:
        UserError: a sampler whose steps are not linear, a schedule for other blocks, or one with guidance where there
            is none.
    """
    if schedule.guidance is not None and problem.guidance_scale is None:
        raise UserError(f"guidance: {problem.options.model} is not guided here; take it out of the schedule")
    if schedule.blocks != problem.target.blocks:
        problem = _with_blocks(problem, schedule.blocks)
    sampler = schedule.sampler
    options = replace(
        problem.options, sampler=sampler.class_name, steps=sampler.num_inference_steps, guidance_gates=False
    )
    problem = _with_scheduler(problem, scheduler_of(schedule), replace(problem.target, sampler=sampler), options)
    return _with_reads(problem, schedule.forecast, schedule.guidance)


def all_guided(problem: Problem) -> Problem:
    """The same problem with all of the guidance at all evaluations: what full runs are made with."""
    return _with_reads(problem, problem.supernet.forecast, None)


def with_guidance(problem: Problem, guidance: Sequence[float] | None) -> Problem:
    """The same problem with this guidance of its evaluations, which is searched no more."""
    problem = replace(problem, options=replace(problem.options, guidance_gates=False))
    problem = replace(problem, costs=costs_of(problem, problem.traced.graph))
    return _with_reads(problem, problem.supernet.forecast, guidance)


def _with_reads(problem: Problem, forecast: Reads | None, guidance: Sequence[float] | None) -> Problem:
    """The same problem with what its removed blocks read, and what its evaluations have of the guidance."""
    if (forecast, guidance) == (problem.supernet.forecast, problem.supernet.guidance):
        return problem
    supernet = problem.source.supernet(problem.options.granularity, problem.cache_kinds, forecast, guidance=guidance)
    problem = replace(problem, supernet=supernet)
    return replace(problem, costs=costs_of(problem, problem.traced.graph))


def with_guidance_scale(problem: Problem, scale: float) -> Problem:
    """The same problem, and its reference, at another guidance scale."""
    source, options = problem.source, replace(problem.options, guidance_scale=scale)
    names, labels = _names_and_labels(options, source, problem.names if _takes_text(source) else None)
    conditions = _encoded(source, problem.traced, bool(options.guidance), names, labels, scale)
    reference = None if problem.reference is None else with_guidance_scale(problem.reference, scale)
    guided = scale if problem.guidance_scale is not None else None
    return replace(problem, options=options, conditions=conditions, guidance_scale=guided, reference=reference)


def with_cache(problem: Problem, kind: CacheKind) -> Problem:
    """The same model and images with another kind of cache for every block; the denoiser is traced again."""
    options = replace(problem.options, cache=kind)
    target = schedule_target(options.model, options.sampler, options.steps, options.granularity, kind)
    return _with_blocks(replace(problem, options=options), target.blocks)


def _with_blocks(problem: Problem, blocks: tuple[BlockEntry, ...]) -> Problem:
    """The same model with other kinds of cache, traced again."""
    options, source = problem.options, problem.source
    target = replace(problem.target, blocks=blocks)
    kinds = {block.name: block.cache for block in blocks}
    shape = _shape(source, options)
    specs = source.family.blocks(source.config, options.granularity)
    # Tracing is done where the model is on loading: on the CPU.
    source.denoiser.to("cpu")
    traced = trace(source.denoiser, source.family, source.config, specs, kinds, shape, "fp32")
    source.denoiser.to(problem.device)
    return replace(
        problem,
        options=options,
        supernet=source.supernet(options.granularity, kinds),
        target=target,
        traced=traced,
        costs=costs_of(problem, traced.graph),
    )


def _encoded(
    source: Source,
    traced: TracedModel,
    guidance: bool,
    names: Sequence[str],
    labels: Sequence[int],
    scale: float | None,
) -> tuple[dict[str, Tensor], ...]:
    """One set of forward inputs a prompt or class."""
    if any(spec.source == "image" for spec in traced.conditions):
        _log.warning("%s: draws from pictures; here each is the same random noise", source.name)
    return tuple(
        reference_conditions(
            source, traced.conditions, guidance=guidance, prompts=(name,), labels=(label,), guidance_scale=scale
        )
        for name, label in zip(names, labels, strict=True)
    )


def _check_guidance_gates(options: ProblemOptions) -> None:
    """Before anything heavy is loaded."""
    if not options.guidance_gates:
        return
    family, config = denoiser_config(options.model)
    if options.guidance is False:
        raise UserError("--search-guidance: there is no unconditional half with --no-guidance; leave out one")
    if options.guidance is None and not family.is_guided(config, pipeline_index(options.model)):
        raise UserError(f"--search-guidance: {options.model} has no unconditional half; leave it out")


def _prompts(options: ProblemOptions) -> tuple[str, ...] | None:
    """Read before anything heavy is loaded."""
    if options.prompts is not None:
        return read_prompts(options.prompts)
    built_in = built_in_prompts(options.model)
    family, config = denoiser_config(options.model)
    if built_in is None and family.text(config, None) is not None and not options.random_conditions:
        raise UserError(f"{options.model}: is guided by text; give --prompts, a text file with one prompt a line")
    return built_in


def _names_and_labels(
    options: ProblemOptions, source: Source, prompts: tuple[str, ...] | None
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """One name and one label a condition; a text model looks at the names, a class model at the labels."""
    if _takes_text(source):
        if options.class_labels is not None:
            raise UserError(f"--class-labels: {options.model} is guided by text; give --prompts")
        prompts = prompts or ("",)  # none with random conditions
        return prompts, (0,) * len(prompts)
    if not _takes_classes(source):
        for option, given in (("--prompts", prompts), ("--class-labels", options.class_labels)):
            if given is not None:
                raise UserError(f"{option}: {options.model} is guided by neither text nor classes; leave it out")
        return ("",), (0,)
    if prompts is not None:
        raise UserError(f"--prompts: {options.model} is guided by class labels; give --class-labels")
    labels = options.class_labels
    if labels is None:
        labels = known_labels(getattr(source.pipeline, "labels", {}), source.config)
    check_labels(labels, source.config)
    return tuple(str(label) for label in labels), labels


def _takes_text(source: Source) -> bool:
    return source.text is not None


def _takes_classes(source: Source) -> bool:
    return class_count(source.config) is not None


def _draws(seed: int, shape: tuple[int, ...], count: int) -> list[Tensor]:
    stream = TorchNoise(seed)
    return [torch.from_numpy(stream.randn((1, *shape))[0]) for _ in range(count)]


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: is no device of torch; give cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch sees no CUDA device here; use cpu")
    return device

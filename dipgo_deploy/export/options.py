"""How a schedule is exported: everything that ``dipgo-export`` decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dipgo_deploy import arguments
from dipgo_deploy.bundle.manifest import Layout
from dipgo_deploy.bundle.quantized import ACTIVATIONS, METHODS, Method
from dipgo_deploy.bundle.shapes import Range
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.weighing import check_graph_costs
from dipgo_deploy.plan.weigh import GraphCosts

LayoutChoice = Literal["auto"] | Layout


@dataclass(frozen=True)
class ExportOptions:
    """How a schedule is exported; the defaults are those of ``dipgo-export``.

    Attributes:
        dtype: ``fp32``, ``fp16`` or ``bf16``.
        batch: images per launch, a number or a range.
        guidance: classifier-free guidance in the graphs, which double the batch; None: as the pipeline has it.
        guidance_batch: how many of the two halves of guidance a launch has: 2, both at once; 1, one after the other in
            half the memory of activations, by the same graph.
        height, width: pixels, a number or a range; None: the model's native size.
        num_frames: frames of the video, of a model of videos; None: as many as its pipeline makes.
        max_variants: re-enable the cheapest skipped blocks until at most so many graphs are left.
        graph_costs: what graphs cost on the machine that will run them; skipped blocks are re-enabled where a graph
            costs more than it saves there, and what becomes of the schedule is said.
        layout: ``variants``, a graph for each kind of evaluation; ``segments``, each weight in one graph and several
            launches an evaluation; ``auto``, segments for fp32 where variants would hold the weights more than four
            times.
        strength: start from a picture and run this share of the steps, as diffusers' image-to-image pipelines do.
        allow_other_config: accept a schedule made for another configuration of the same class.
        check: compare what was written with the model before it is published.
        components: export text encoders, tokenizers and VAE too; without them an engine directory takes embeddings
            and gives latents.
        overwrite: replace an engine directory that exists.
        low_memory: hold the weights once and compare in processes of their own; a planned export is then written once.
            None: for weights of more than ``low_memory.LARGE_BYTES``; a planned export says what it became.
        timestep_tables: what depends on the timestep alone as tables, made at export, without its weights; None: where
            these are at least 5 % of all. A planned export says what it became.
        prologue: what depends on the conditions (a class, the text) and not on the latent as a graph of its own, which
            runs once a run for all timesteps; None: where that takes at least 5 % of the weights out of the others. Not
            without ``timestep_tables``. A planned export says what it became.
        class_labels: make tables of what depends on the class too, for these class ids alone: no other class can be
            drawn then. Empty: any class.
        quantize: weights in fewer bits, each made a number of the type of the graphs where it is used:
            ``int8-weights``, ``int4-weights``; or weights and activations: ``int8``, ``fp8`` (float8 e4m3fn), with
            scales that are recorded while the loop runs in floats; None: as the type of the graphs has them.
        quantize_budget: of ``int8`` and ``fp8``, the largest error that a launch may have of it, root mean square of
            the difference over that of the value; blocks that lose most stay as they are until it is met. None: 0.05.
        calibration_samples: of these, how many runs are recorded.
        calibration_prompts: what they show, of a text model; empty: a few everyday ones.
        self_test: record a loop of the model, which ``Pipeline.self_test`` compares with anywhere; at most 64 MiB of
            it, with ``low_memory`` its beginning and each variant's first launch. None: where it fits 1 MiB and the
            model's loop runs for the check (or would, of bf16 without ``low_memory``).
    """

    dtype: str = "fp32"
    batch: int | Range = 1
    guidance: bool | None = None
    guidance_batch: Literal[1, 2] = 2
    height: int | Range | None = None
    width: int | Range | None = None
    num_frames: int | None = None
    max_variants: int | None = None
    graph_costs: GraphCosts | None = None
    layout: LayoutChoice = "auto"
    strength: float | None = None
    allow_other_config: bool = False
    check: bool = True
    components: bool = True
    overwrite: bool = False
    low_memory: bool | None = None
    timestep_tables: bool | None = None
    prologue: bool | None = None
    class_labels: tuple[int, ...] = ()
    quantize: Method | None = None
    quantize_budget: float | None = None
    calibration_samples: int = 4
    calibration_prompts: tuple[str, ...] = ()
    self_test: bool | None = None


def check_options(options: ExportOptions) -> None:
    """Refuse (UserError) options of another type, naming the first, and such as do not go together."""
    arguments.instance("options", options, ExportOptions, "ExportOptions")
    arguments.choice("dtype", options.dtype, ("fp32", "fp16", "bf16"))
    if arguments.whole("guidance_batch", options.guidance_batch, least=1) > 2:
        raise UserError(f"--guidance-batch {options.guidance_batch}: guidance has two halves; give 1 or 2")
    arguments.choice("layout", options.layout, ("auto", "variants", "segments"))
    if options.quantize is not None:
        arguments.choice("quantize", options.quantize, METHODS)
    arguments.whole("calibration_samples", options.calibration_samples, least=1)
    prompts = arguments.items("calibration_prompts", options.calibration_prompts, "prompts")
    for prompt in prompts:
        arguments.text("calibration_prompts", prompt)
    budget = options.quantize_budget
    if budget is not None and not arguments.number("quantize_budget", budget) > 0:
        raise UserError(f"--quantize-budget {budget}: give a number above 0, such as 0.05")
    if (budget is not None or prompts) and options.quantize not in ACTIVATIONS:
        option = "--quantize-budget" if budget is not None else "--calibration-prompts"
        raise UserError(f"{option}: goes with --quantize {' or '.join(ACTIVATIONS)}; leave it out")
    for name in ("batch", "height", "width"):
        value = getattr(options, name)
        if not isinstance(value, Range) and not (value is None and name != "batch"):
            arguments.whole(name, value, least=1)
    for name in ("max_variants", "num_frames"):
        if getattr(options, name) is not None:
            arguments.whole(name, getattr(options, name), least=1)
    if options.strength is not None:
        arguments.number("strength", options.strength)
    for name in ("allow_other_config", "check", "components", "overwrite"):
        arguments.flag(name, getattr(options, name))
    for name in ("guidance", "low_memory", "timestep_tables", "prologue", "self_test"):
        if getattr(options, name) is not None:
            arguments.flag(name, getattr(options, name))
    for label in arguments.items("class_labels", options.class_labels, "class ids"):
        arguments.whole("class_labels", label, least=0)
    for option, given in (("--prologue", options.prologue), ("--class-labels", bool(options.class_labels))):
        if given and options.timestep_tables is False:
            raise UserError(f"{option}: not with --no-timestep-tables; leave one of the two out")
    if options.graph_costs is not None:
        arguments.instance("graph_costs", options.graph_costs, GraphCosts, "GraphCosts")
        check_graph_costs(options.graph_costs, "graph_costs")
        if options.layout == "segments" or options.max_variants is not None:
            other = "--layout segments" if options.layout == "segments" else "--max-variants"
            raise UserError(f"--graph-costs: not with {other}; leave one of the two out")
    if options.layout == "segments" and options.max_variants is not None:
        raise UserError("--max-variants: not with --layout segments, where no weight is in two graphs; leave it out")

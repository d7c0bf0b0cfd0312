"""Options of the commands: each stands in a group of the help, shows its default.

A name of another program that means the same (diffusers' ``--num-inference-steps``, Polygraphy's ``--refittable``) is
shown beside ours. A name that an option had in an earlier release is taken for one release more, and not shown.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import click

from dipgo_deploy._version import __version__
from dipgo_deploy.backends import BACKENDS

if TYPE_CHECKING:
    from click.parser import _OptionParser

F = TypeVar("F", bound=Callable[..., Any])

GroupName = Literal[
    "Model",
    "Schedule",
    "Prompt",
    "Image",
    "Search",
    "Pruner",
    "Calibration",
    "Measurement",
    "Shape",
    "Engine",
    "LoRA",
    "Comparison",
    "Runtime",
    "Server",
    "Ray",
    "Output",
    "General",
]
GROUPS: tuple[str, ...] = get_args(GroupName)
"""The groups of the help, in the order in which it has them."""

PATH = click.Path(path_type=Path)

_CONTEXT = {"help_option_names": ["-h", "--help"]}


class Option(click.Option):
    """An option in a group.

    group: heading of the help under which it stands.
    old: names of an earlier release, which are taken and not shown.
    """

    def __init__(self, *args: Any, group: GroupName, old: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.group = group
        self.old = tuple(old)

    def add_to_parser(self, parser: _OptionParser, ctx: click.Context) -> None:
        """Take the old names too; help and messages have the present ones only."""
        shown = self.opts
        self.opts = [*shown, *self.old]
        try:
            super().add_to_parser(parser, ctx)
        finally:
            self.opts = shown

    def get_help_extra(self, ctx: click.Context) -> Any:
        """A default that is told in words, without click's parentheses around it."""
        extra = super().get_help_extra(ctx)
        if isinstance(self.show_default, str):
            extra["default"] = self.show_default
        return extra


class _Sections(click.Command):
    def __init__(self, *args: Any, **settings: Any) -> None:
        settings["context_settings"] = _CONTEXT | (settings.get("context_settings") or {})
        super().__init__(*args, **settings)

    def get_short_help_str(self, limit: int = 0) -> str:
        """The first sentence, whole."""
        return super().get_short_help_str(limit=1000)

    def option_groups(self, ctx: click.Context) -> dict[str, list[tuple[str, str]]]:
        """What the help says of each option (its names, and the text) by group, in the order of the help."""
        groups: dict[str, list[tuple[str, str]]] = {name: [] for name in GROUPS}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                groups[getattr(param, "group", "General")].append(record)
        return {name: records for name, records in groups.items() if records}

    def write_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One section a group."""
        for name, records in self.option_groups(ctx).items():
            with formatter.section(f"{name} options"):
                formatter.write_dl(records)


class Command(_Sections):
    """A command with ``-h`` and its options in groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As click does, by group."""
        self.write_options(ctx, formatter)


class Group(_Sections, click.Group):
    """A command of commands, all of this kind."""

    command_class = Command
    group_class = type

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As click does, by group."""
        self.write_options(ctx, formatter)
        self.format_commands(ctx, formatter)


def option(group: GroupName, *names: str, old: Sequence[str] = (), **settings: Any) -> Callable[[F], F]:
    """``click.option`` in a group, with the default shown.

    show_default: a text where the default is not a plain value, as in "the model's own".
    old: names of an earlier release.
    """
    return click.option(*names, cls=Option, group=group, old=old, **{"show_default": True} | settings)


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one, in this order of the help."""

    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def version_option(function: F) -> F:
    """Add ``--version``."""
    decorate = click.version_option(
        __version__, message="%(prog)s %(version)s", help="Show the version and exit.", cls=Option, group="General"
    )
    return decorate(function)


MODEL_HELP = (
    "A built-in model (fashion-sd, fashion-dit), a folder in diffusers' format, a hub id, or a file as "
    "model.safetensors?config=FOLDER."
)

model_option = option("Model", "--model", required=True, help=MODEL_HELP)


def engine_dir_option(function: F) -> F:
    """Add ``--engine-dir``, of an engine directory that is there."""
    text = "Engine directory that dipgo-export made."
    return option("Model", "--engine-dir", type=PATH, required=True, help=text)(function)


def of_several_options(function: F) -> F:
    """Add ``--schedule`` and ``--launches``, which choose one schedule of an engine directory."""
    text = "Of an engine directory with several schedules, the name of one."
    named = option("Schedule", "--schedule", metavar="NAME", show_default="its first", help=text)
    text = "Or the one of its schedules that has launches at so many evaluations."
    counted = option("Schedule", "--launches", type=click.IntRange(min=1), show_default="its first's", help=text)
    return named(counted(function))


def allow_other_config_option(function: F) -> F:
    """Add ``--allow-other-config``."""
    text = "Accept a model of the schedule's class that has another configuration and the same blocks."
    return option("Model", "--allow-other-config", is_flag=True, help=text)(function)


def guidance_option(function: F) -> F:
    """Add ``--guidance`` and ``--no-guidance``."""
    text = "Run with classifier-free guidance, or without."
    return option("Model", "--guidance/--no-guidance", default=None, show_default="as the pipeline does", help=text)(
        function
    )


guidance_scale_option = option(
    "Prompt",
    "--guidance-scale",
    type=float,
    show_default="the pipeline's own",
    help="Scale of the guidance; 1 is none.",
)

sampler_options = options(
    option(
        "Schedule",
        "--sampler",
        show_default="the model's own",
        help="Sampler: ddim, pndm, dpm++2m, euler, ..., or the name of a diffusers scheduler class.",
    ),
    option(
        "Schedule",
        "--steps",
        "--num-inference-steps",
        type=click.IntRange(min=1),
        default=50,
        help="Steps asked of the sampler.",
    ),
)


def granularity_option(default: Literal["block", "layer"] = "block") -> Callable[[F], F]:
    """``--granularity`` with its default."""
    return option(
        "Schedule",
        "--granularity",
        type=click.Choice(["block", "layer"]),
        default=default,
        help="What one gate switches: a whole block, or an attention or MLP layer inside a block.",
    )


def cache_option(default: str) -> Callable[[F], F]:
    """``--cache``. default: says which kind is taken."""
    return option(
        "Schedule",
        "--cache",
        type=click.Choice(["output", "residual"]),
        show_default=default,
        help="What stands in for a skipped block: its last output, or its current input plus its last residual.",
    )


def forecast_options(*kinds: str) -> Callable[[F], F]:
    """``--forecast`` with its order and contraction, as one argument ``forecast``: a rule, the number of values whose
    weights are to be fitted, or None. kinds: what the command takes."""
    add = options(
        option(
            "Schedule",
            "--forecast",
            type=click.Choice(kinds),
            show_default="none",
            help="Read skipped blocks as a weighted sum of the values that they stored last: extrapolated as in "
            "TaylorSeer (taylor) or HiCache (hermite)" + (", or with fitted weights." if "weights" in kinds else "."),
        ),
        option(
            "Schedule",
            "--forecast-order",
            type=click.IntRange(1, 2),
            show_default="1",
            help="How many values before the last one are read; where fewer were stored, those.",
        ),
        option(
            "Schedule",
            "--forecast-contraction",
            type=click.FloatRange(0, 1, min_open=True),
            show_default="0.5",
            help="Of hermite: how far its polynomials are drawn together.",
        ),
    )

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def merged(
            *args: Any,
            forecast: str | None,
            forecast_order: Literal[1, 2] | None,
            forecast_contraction: float | None,
            **rest: Any,
        ) -> Any:
            from dipgo_deploy.errors import UserError
            from dipgo_deploy.schedule.forecast import CONTRACTION, RuleForecast

            if forecast is None and forecast_order is not None:
                raise UserError("--forecast-order: means nothing without --forecast; leave it out")
            if forecast != "hermite" and forecast_contraction is not None:
                raise UserError("--forecast-contraction: belongs to --forecast hermite; leave it out")
            order: Literal[1, 2] = forecast_order or 1
            made: RuleForecast | int | None = None
            if forecast == "weights":
                made = order + 1
            elif forecast == "taylor":
                made = RuleForecast(kind="taylor", order=order)
            elif forecast == "hermite":
                made = RuleForecast(kind="hermite", order=order, contraction=forecast_contraction or CONTRACTION)
            return function(*args, forecast=made, **rest)

        return add(merged)  # type: ignore[return-value]

    return decorate


def prompts_option(function: F) -> F:
    """Add ``--prompts``."""
    text = "Text file with one prompt a line."
    return option("Prompt", "--prompts", type=PATH, show_default="the prompts of fashion-sd", help=text)(function)


def class_labels_option(function: F) -> F:
    """Add ``--class-labels`` as numbers."""
    return option(
        "Prompt",
        "--class-labels",
        show_default="every class that the model names",
        help="Class ids of a class model, with commas between them, as in 0,1,2.",
    )(function)


def _pixels(name: str, what: str) -> Callable[[F], F]:
    return option(
        "Shape", name, type=click.IntRange(min=1), show_default="the model's own", help=f"Image {what} in pixels."
    )


_frames = option(
    "Shape",
    "--num-frames",
    type=click.IntRange(min=1),
    show_default="as its pipeline",
    help="Frames of the video, of a model that makes videos.",
)

size_options = options(_pixels("--height", "height"), _pixels("--width", "width"), _frames)

device_option = option("Runtime", "--device", default="cpu", help="Torch device that the model runs on.")


def backend_option(function: F) -> F:
    """Add ``--backend``, of a command that draws with an engine directory."""
    text = (
        "ONNX Runtime on cpu or cuda, OpenVINO on the CPU, or engines that dipgo-build made; auto takes cuda where it "
        "works, else cpu."
    )
    return option("Runtime", "--backend", type=click.Choice(BACKENDS), default="auto", help=text)(function)


def batch_window_option(function: F) -> F:
    """Add ``--batch-window``."""
    text = "Seconds that a picture waits for others that can be drawn with it."
    return option("Server", "--batch-window", type=click.FloatRange(0, 60), default=0.02, help=text)(function)


def max_queue_option(text: str) -> Callable[[F], F]:
    """``--max-queue``, with its help."""
    return option("Server", "--max-queue", type=click.IntRange(1, 100_000), default=64, help=text)


def threads_option(default: str) -> Callable[[F], F]:
    """``--threads``. default: says how many are taken."""
    return option("Runtime", "--threads", type=click.IntRange(min=1), show_default=default, help="Threads on the CPU.")


graph_costs_options = options(
    option(
        "Engine",
        "--graph-costs",
        type=PATH,
        show_default="this machine's, measured where they are needed",
        help="What dipgo-bench graph-costs measured on the machine that will run it.",
    ),
    option(
        "Engine",
        "--pictures",
        type=click.FloatRange(min=1),
        show_default="10, or what --graph-costs has",
        help="Pictures that a process draws, which share what loading a graph takes: 1 for a process a picture, "
        "thousands for a server.",
    ),
)


def checkpoint_options(what: str) -> Callable[[F], F]:
    """``--checkpoint`` and ``--resume`` of a search or a calibration, as ``what`` says; the second needs the first."""
    add = options(
        option(
            "Output",
            "--checkpoint",
            type=PATH,
            show_default="none",
            help=f"Folder for the state of the {what}, to go on from.",
        ),
        option(
            "Output", "--resume", is_flag=True, help="Go on from --checkpoint, to the result of an uninterrupted run."
        ),
    )

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def checked(*args: Any, checkpoint: Path | None, resume: bool, **rest: Any) -> Any:
            from dipgo_deploy.errors import UserError

            if resume and checkpoint is None:
                raise UserError("--resume: needs --checkpoint, the folder to go on from")
            return function(*args, checkpoint=checkpoint, resume=resume, **rest)

        return add(checked)  # type: ignore[return-value]

    return decorate


def refine_option(function: F) -> F:
    """Add ``--refine-iterations``."""
    return option(
        "Calibration",
        "--refine-iterations",
        type=click.IntRange(min=0),
        default=60,
        help="Steps of gradient descent that refine rows and timesteps of the fitted solver together; kept only if "
        "the images held aside come closer. 0 leaves the fit as it is.",
    )(function)


def class_label_numbers(text: str | None) -> tuple[int, ...] | None:
    """``0,1,2`` as numbers; raises UserError for anything else."""
    from dipgo_deploy.errors import UserError

    if text is None:
        return None
    try:
        labels = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--class-labels {text}: is no list of numbers; give them as in 0,1,2") from None
    return labels

"""``dipgo VERB``: every console script under one name. A verb's module is imported only when that verb runs."""

from __future__ import annotations

from importlib import import_module

import click

from dipgo_deploy.cli.common import entry_point, examples
from dipgo_deploy.cli.options import Group, version_option

# Verb -> (module with a click command named ``command``, line for the help). The line stands here so that
# ``dipgo --help`` imports no verb.
_VERBS = {
    "optimize": ("dipgo_deploy.cli.optimize", "From a model to an engine directory with few launches."),
    "schedule": ("dipgo_deploy.cli.schedule", "Make, import, check and show schedules."),
    "search": ("dipgo_deploy.cli.search", "Find schedules: the DiP-GO pruner and its baselines."),
    "calibrate": ("dipgo_deploy.cli.calibrate", "Fit a solver of its own to a schedule."),
    "export": ("dipgo_deploy.cli.export", "Compile a model and a schedule into an engine directory."),
    "build": ("dipgo_deploy.cli.build", "Build TensorRT engines for an engine directory."),
    "run": ("dipgo_deploy.cli.run", "Generate images from an engine directory."),
    "serve": ("dipgo_deploy.cli.serve", "Serve engine directories over HTTP."),
    "triton": ("dipgo_deploy.cli.triton", "Put an engine directory into a model repository for NVIDIA Triton."),
    "bench": ("dipgo_deploy.cli.bench", "Measure what schedules do to the images."),
    "compare": ("dipgo_deploy.cli.compare", "Compare an engine directory with the reference."),
    "inspect": ("dipgo_deploy.cli.inspect", "Show what is in an engine directory, and what differs between two."),
    "report": ("dipgo_deploy.cli.report", "Show an engine directory as one page of HTML."),
}


class _LazyGroup(Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        command = import_module(_VERBS[cmd_name][0]).command
        if not isinstance(command, click.Command):
            raise TypeError(f"{_VERBS[cmd_name][0]}.command is not a click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(verb, line) for verb, (_, line) in _VERBS.items()])


@click.group(
    name="dipgo",
    cls=_LazyGroup,
    epilog=examples(
        "dipgo schedule uniform --model fashion-sd --steps 50 --interval 5 -o schedule.json",
        "dipgo export --model fashion-sd --schedule schedule.json --engine-dir engines/fashion-sd",
        'dipgo run --engine-dir engines/fashion-sd --prompt "a sneaker" --output sneaker.png',
        "dipgo compare --engine-dir engines/fashion-sd",
    ),
)
@version_option
def command() -> None:
    """Deploy diffusion models whose blocks are skipped on a schedule."""


main = entry_point(command)

"""Every option of every command: in a group, with a help text that is whole and a default that is shown."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from dipgo_deploy.cli import main as dipgo
from dipgo_deploy.cli.options import GROUPS, Command, Group, Option, option


def commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from commands(child, f"{path} {name}")


ALL = dict(commands(dipgo.command, "dipgo"))
OPTIONS = [
    (path, param)
    for path, command in ALL.items()
    for param in command.params
    if isinstance(param, click.Option) and not param.hidden
]
# As README.md had them before the options were put in order.
OLD_LINES = """
dipgo-schedule uniform --model fashion-sd --sampler ddim --steps 50 --interval 5 -o uniform.json
dipgo-schedule random --model fashion-dit --ratio 0.5 --seed 1 -o random.json
dipgo-schedule deepcache --model fashion-sd --interval 3 --branch 0 -o deepcache.json
dipgo-schedule show dipgo_deploy/assets/schedules/fashion-sd-ddim50.json --model fashion-sd
dipgo-schedule diff fashion-sd-ddim50.json fashion-sd-pndm50.json
dipgo-schedule validate uniform.json --model fashion-sd
dipgo-schedule import dipgo-gates gates.pkl --model ./sd15 --sampler pndm --steps 50 -o gates.json
dipgo-schedule import csv keep.csv --model fashion-dit --steps 50 -o keep.json
dipgo-schedule import smoothcache 50-N-2-fora.json --model ./dit-xl --sampler ddim --steps 50 -o fora.json
dipgo-schedule import l2c-router DDIM50_router.pt --model ./dit-xl --sampler ddim --steps 50 -o l2c.json
dipgo-export --model fashion-sd --schedule dipgo_deploy/assets/schedules/fashion-sd-ddim50.json --plan-only
dipgo-export --model fashion-sd --schedule dipgo_deploy/assets/schedules/fashion-sd-ddim50.json --engine-dir engines/sd
dipgo-export --model fashion-dit --schedule random.json --engine-dir engines/dit --max-variants 6
dipgo-run --engine-dir engines/sd --prompt "a photo of a sneaker" --guidance-scale 4 -o sneaker.png
dipgo-run --engine-dir engines/sd --prompt "a photo of a bag" --prompt "a coat" --num-images 4 --seed 7 -o grid.png
dipgo-run --engine-dir engines/dit --class-labels sneaker,bag,3 -o classes.png
dipgo-compare --engine-dir engines/sd
dipgo-build --engine-dir engines/sd --backend tensorrt-rtx
dipgo-search --model m --prune-ratio 0.8 -o s.json --batch 2 --accumulate 3 --loss l1 --alpha 1 --stop-share 0.3
dipgo-search --model m --prune-ratio 0.8 -o s.json --optimiser sgd --lr 1 --momentum 0.9 --weight-decay 0 --warmup 5
dipgo-search --model m --prune-ratio 0.4 0.8 -o s.json --clip 1 --temperature 2 1 --width-of-queries 8 --encoder linear
dipgo-search --model m --prune-ratio 0.8 -o s.json --layers 2 --heads shared --pool 8 --one-noise --precision bf16
dipgo-bench quality a.json --model fashion-sd --out q.json
""".strip().splitlines()
# Names of other programs, and ours.
SAME = {
    "schedule uniform": [("--num-inference-steps", "--steps")],
    "search": [("--num-inference-steps", "--steps")],
    "bench quality": [("--num-inference-steps", "--steps")],
    "run": [("--num-images-per-prompt", "--num-images"), ("--controlnet-conditioning-scale", "--control-scale")],
    "build": [
        ("--builder-optimization-level", "--opt-level"),
        ("--strip-plan", "--strip"),
        ("--refittable", "--refit"),
    ],
}


def test_no_name_means_two_options() -> None:
    for path, command in ALL.items():
        names = [name for param in command.params for name in param.opts]
        assert len(set(names)) == len(names), path


def test_all_commands_are_of_the_kind_that_has_groups() -> None:
    assert len(ALL) > 20
    assert all(isinstance(command, Command | Group) for command in ALL.values())


@pytest.mark.parametrize(("path", "param"), OPTIONS, ids=[f"{path} {param.name}" for path, param in OPTIONS])
def test_every_option_says_what_it_is_for(path: str, param: click.Option) -> None:
    assert isinstance(param, Option) and param.group in GROUPS
    text = param.help or ""
    assert re.match(r"[A-Z]|(\w+: )", text) and text.endswith(".") and len(text.split()) >= 3, text
    assert "[default" not in text
    if not param.required and not (param.is_flag and not param.secondary_opts):
        extra = param.get_help_extra(click.Context(ALL[path]))
        assert extra.get("default"), "an option that may be left out says what holds then"


@pytest.mark.parametrize("path", ALL)
def test_help_is_shown_by_its_short_name_in_groups(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dipgo.main([*path.split()[1:], "-h"]) == 0
    shown = capsys.readouterr().out
    headings = [line.removesuffix(" options:") for line in shown.splitlines() if line.endswith(" options:")]
    assert headings == sorted(headings, key=GROUPS.index)
    assert headings[-1] == "General"
    assert "..." not in shown.partition("Commands:")[2].partition("Examples:")[0]


@pytest.mark.parametrize("line", OLD_LINES)
def test_old_command_lines_are_still_understood(line: str) -> None:
    name, *arguments = shlex.split(line)
    parse(f"dipgo {name.removeprefix('dipgo-')}", arguments)


def parse(path: str, arguments: list[str]) -> dict[str, object]:
    while isinstance(ALL[path], click.Group):
        path = f"{path} {arguments.pop(0)}"
    return ALL[path].make_context(path, arguments).params


@pytest.mark.parametrize(("verb", "other", "ours"), [(verb, *names) for verb, pairs in SAME.items() for names in pairs])
def test_names_of_other_programs_mean_the_same(verb: str, other: str, ours: str) -> None:
    command = ALL[f"dipgo {verb}"]
    param = next(param for param in command.params if other in param.opts)
    assert param.opts[:2] == [ours, other]
    assert param.name == ours.removeprefix("--").replace("-", "_")


def test_an_old_name_is_taken_and_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    @click.command(cls=Command)
    @option("Output", "-o", "--output", old=["--out"], show_default="none", help="Where it goes.")
    def command(output: str | None) -> None:
        click.echo(output)

    for name in ("--out", "--output", "-o"):
        command.main([name, "a"], standalone_mode=False)
    assert capsys.readouterr().out == "a\na\na\n"
    with pytest.raises(SystemExit):
        command.main(["-h"])
    shown = capsys.readouterr().out
    assert "Output options:\n  -o, --output TEXT  Where it goes.  [default: none]\n" in shown
    assert "--out " not in shown
    with pytest.raises(click.BadOptionUsage, match="'--output' requires an argument|'--out' requires an argument"):
        command.main(["--out"], standalone_mode=False)


def test_the_package_is_a_program() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "dipgo_deploy", "schedule", "diff", "none.json", "none.json"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert shown.returncode == 2 and shown.stderr.startswith("error: none.json: no such file")
    shown = subprocess.run([sys.executable, "-m", "dipgo_deploy", "-h"], capture_output=True, text=True, timeout=60)
    assert shown.stdout.startswith("Usage: python -m dipgo_deploy [OPTIONS] COMMAND")
    assert all(f"\n  {verb} " in shown.stdout for verb in ("export", "run", "search"))

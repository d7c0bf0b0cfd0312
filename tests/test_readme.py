"""What the README and the documentation say can be typed, and what they link to is there.

Every command line of every page is parsed. Those of blocks without a mark are run, in one folder, page by page. A mark
is a comment in a block's first line that tells the reader what it needs (``MARK``). ``docs/results`` is a record of
what was run, not something to type.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
import urllib.request
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import click
import pytest
import yaml
from shared_traces import shared_traces

from dipgo_deploy.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
QUICKSTART = ROOT / "docs" / "quickstart.md"
RESULTS = ROOT / "docs" / "results"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "engines/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
LINK = re.compile(r"\[[^\]]*\]\(([^)#]+)\)")
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
MARK = re.compile(r"# (?:needs|takes|part of) .+")
RTX = "# needs the extra tensorrt-rtx"

# Lines that are no command of ours, and what runs them.
ELSEWHERE = {
    "tools/demo.sh": "tests/tools/test_demo.py",
    "tools/test.sh": ".ci/run",
    "pip install -c constraints.txt -e '.[cpu,export]'": "tools/setup.sh",
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    language: str
    text: str

    @property
    def mark(self) -> str | None:
        """What it needs that a test does not have."""
        first = self.text.partition("\n")[0]
        return first if MARK.fullmatch(first) else None

    @property
    def lines(self) -> list[str]:
        """Its lines without comments and empty ones; one that ends with a backslash goes on with the next."""
        whole = re.sub(r"\\\n\s*", "", self.text)
        return [line for line in map(_without_comment, whole.splitlines()) if line]


def _without_comment(line: str) -> str:
    return re.sub(r"(^|\s)#.*", "", line).strip()


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    return [Block(page, language, text) for language, text in FENCE.findall(page.read_text(encoding="utf-8"))]


BLOCKS = [block for page in PAGES if RESULTS not in page.parents for block in blocks(page)]
COMMANDS = [(block, line) for block in BLOCKS if block.language == "bash" for line in block.lines]
OURS = sorted({line for _, line in COMMANDS if line.startswith("dipgo-")})
TO_RUN = [block for block in BLOCKS if block.mark is None and block.language in ("bash", "python")]
PAGES_TO_RUN = list(dict.fromkeys(block.page for block in TO_RUN if block.page not in (README, QUICKSTART)))


def click_command(name: str) -> click.Command:
    return import_module(f"dipgo_deploy.cli.{name.removeprefix('dipgo-')}").command


def leaf(arguments: list[str]) -> tuple[click.Command, list[str]]:
    """The subcommand that a line calls, and the arguments left for it."""
    found, rest = click_command(arguments[0]), arguments[1:]
    while isinstance(found, click.Group):
        child = found.get_command(click.Context(found), rest[0])
        assert child is not None, f"{shlex.join(arguments)}: no subcommand {rest[0]}"
        found, rest = child, rest[1:]
    return found, rest


def test_there_are_commands_to_check() -> None:
    verbs = main.command.list_commands(click.Context(main.command))
    assert {line.split()[0] for line in OURS} == {f"dipgo-{verb}" for verb in verbs}
    reference = (ROOT / "docs" / "reference" / "commands.md").read_text(encoding="utf-8")
    for verb in verbs:
        assert f".. click:: dipgo_deploy.cli.{verb}:command\n   :prog: dipgo-{verb}\n" in reference
    assert {named(page) for page in PAGES_TO_RUN} >= {"docs/howto/own-mask.md", "docs/howto/dit.md", "docs/howto/ci.md"}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_stand_in_blocks_for_the_shell(page: Path) -> None:
    if RESULTS in page.parents:
        return
    rest = FENCE.sub(lambda fence: "" if fence[1] == "bash" else fence[0], page.read_text(encoding="utf-8"))
    assert not re.findall(r"^(?:    )?(?:dipgo|python -m) ?.*", rest, flags=re.MULTILINE)


@pytest.mark.parametrize("line", OURS, ids=str)
def test_every_option_exists(line: str) -> None:
    arguments = shlex.split(line)
    command, rest = leaf(arguments)
    # Only parses: files that a line names need not be there, the commands check that themselves.
    context = command.make_context(arguments[0], list(rest))
    assert not context.args


def test_other_lines_are_run_elsewhere() -> None:
    others = {line for block, line in COMMANDS if not line.startswith(("dipgo-", "polygraphy ")) and block.mark is None}
    assert others == set(ELSEWHERE)
    for name in ELSEWHERE.values():
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_files(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_scripts_and_schedules_named_are_there() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES if RESULTS not in page.parents)
    names = re.findall(r"(?:tools|dipgo_deploy/assets)/[\w./-]+\.(?:sh|json|py)", text)
    assert names
    for name in names:
        assert (ROOT / name).is_file(), name


class Folder:
    """Where the lines of the pages are run: each once, whichever pages it stands on."""

    def __init__(self) -> None:
        self.done: set[str] = set()
        self.printed = ""

    def run(self, page: Path) -> None:
        for block in TO_RUN:
            if block.page == page:
                self.run_block(block)

    def run_block(self, block: Block) -> None:
        for piece in block.lines if block.language == "bash" else [block.text]:
            if piece in self.done or piece in ELSEWHERE:
                continue
            self.done.add(piece)
            with contextlib.redirect_stdout(io.StringIO()) as out:
                if piece.startswith("polygraphy "):
                    done = subprocess.run(shlex.split(piece), capture_output=True, text=True, check=False)
                    assert done.returncode == 0, done.stdout + done.stderr
                elif block.language == "bash":
                    name, *arguments = shlex.split(piece)
                    # `diff` says with its status that the two differ.
                    expected = 1 if arguments[0] in ("diff", "--diff") else 0
                    status = import_module(f"dipgo_deploy.cli.{name.removeprefix('dipgo-')}").main(arguments)
                    assert status == expected, f"{named(block.page)}: {piece}"
                else:
                    exec(compile(piece, named(block.page), "exec"), {})
            self.printed += out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folder]:
    """A folder in which the README and the quickstart, which the other pages build on, were run."""
    path = tmp_path_factory.mktemp("reader")
    (path / "dipgo_deploy").symlink_to(ROOT / "dipgo_deploy")
    with contextlib.chdir(path), shared_traces():
        reader = Folder()
        reader.run(README)
        reader.run(QUICKSTART)
        yield reader


def test_the_quickstart_runs_from_a_schedule_to_pictures(folder: Folder) -> None:
    for name in ("sneaker.png", "grid.png", "classes.png"):
        assert Path(name).stat().st_size > 0


def test_what_show_prints_is_shown(folder: Folder) -> None:
    shown = [block.text for block in BLOCKS if block.language == "text" and "down_blocks.0  █" in block.text]
    assert shown
    for row in "".join(shown).splitlines():
        assert row.strip() in folder.printed, row


@pytest.mark.parametrize("page", PAGES_TO_RUN, ids=named)
def test_the_page_does_what_it_says(page: Path, folder: Folder) -> None:
    folder.run(page)


def test_the_workflow_runs_what_the_page_runs(folder: Folder) -> None:
    """Its steps are lines that were run, or what sets a machine up; what it keeps is a file that they write."""
    page = ROOT / "docs" / "howto" / "ci.md"
    folder.run(page)
    (block,) = (block for block in BLOCKS if block.page == page and block.language == "yaml")
    steps = yaml.safe_load(block.text)["jobs"]["compare"]["steps"]
    runs = [step["run"] for step in steps if "run" in step]
    assert runs[0].startswith("pip install -c constraints.txt -e ") and (ROOT / "constraints.txt").is_file()
    assert len(runs) == 5
    assert all(line in folder.done for line in runs[1:])
    kept = [step["with"]["path"] for step in steps if step.get("uses", "").startswith("actions/upload-artifact@")]
    junit, page_of_it = kept[0].split()
    assert ET.parse(junit).getroot().get("failures") == "0"
    assert Path(page_of_it).read_bytes().startswith(b"<!DOCTYPE html>")


def test_the_server_answers_what_the_page_asks_it(folder: Folder) -> None:
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(package, reason="needs the extra serve")
    page = ROOT / "docs" / "howto" / "serving.md"
    lines = [line for block in BLOCKS if block.page == page for line in block.lines]
    (start,) = (line for line in lines if line.startswith("dipgo-serve "))
    (ask,) = (line for line in lines if line.startswith("curl "))
    code = "import sys; from dipgo_deploy.cli.serve import main; sys.exit(main(sys.argv[1:]))"
    arguments = [sys.executable, "-c", code, *shlex.split(start)[1:], "--port", "0"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            address = server.stderr.readline().split(": ")[0]
            url, body = shlex.split(ask)[1], shlex.split(ask)[-1]
            request = urllib.request.Request(address + url.removeprefix("http://127.0.0.1:8000"), body.encode())
            with urllib.request.urlopen(request, timeout=120) as answer:
                pictures = json.load(answer)["data"]
        finally:
            server.terminate()
        assert server.wait(60) == 0
    assert [picture["seed"] for picture in pictures] == [7, 8] and len({one["b64_json"] for one in pictures}) == 2


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in BLOCKS if block.mark == RTX], ids=lambda block: named(block.page))
def test_engines_are_built_where_the_extra_is_installed(block: Block, folder: Folder) -> None:
    pytest.importorskip("tensorrt_rtx")
    folder.run_block(block)

"""What every command shares: exit statuses, one-line errors, ``--json``, ``--version`` and help examples."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dipgo_deploy import __version__
from dipgo_deploy.errors import ToleranceError, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from dipgo_deploy.lora.merge import LoraReport

F = TypeVar("F", bound=Callable[..., Any])

# Importable module -> extras of this project that bring it in.
_EXTRA_OF_MODULE = {
    "torch": ("export",),
    "diffusers": ("export",),
    "transformers": ("export",),
    "huggingface_hub": ("export",),
    "onnx": ("export",),
    "onnx_ir": ("export",),
    "onnxscript": ("export",),
    "polygraphy": ("compare",),
    "onnxruntime": ("cpu", "gpu"),
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt-rtx",),
    "cuda": ("tensorrt", "tensorrt-rtx"),
}


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """One line that names the extra which brings the missing module in, or None for a module of no extra."""
    module = (error.name or "").partition(".")[0]
    extras = _EXTRA_OF_MODULE.get(module)
    if extras is None:
        return None
    installs = " or ".join(f"pip install 'dipgo-deploy[{extra}]'" for extra in extras)
    return f"this needs the package {module}, which is not installed: {installs}"


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def entry_point(command: click.Command) -> Callable[[Sequence[str] | None], int]:
    """Turn a click command into the ``main`` of a console script.

    ``main(argv=None)`` runs the command (``argv`` without the program's name; None takes ``sys.argv``) and returns the
    exit status: 0 done; 1 a comparison beyond tolerance, or a status the command asked for with ``ctx.exit``; 2 a
    user's mistake or a missing optional package, said in one line on stderr; 130 interrupted.
    """

    def main(argv: Sequence[str] | None = None) -> int:
        try:
            result = command.main(args=None if argv is None else list(argv), standalone_mode=False)
        except UserError as error:
            return _fail(error, 2)
        except ToleranceError as error:
            return _fail(error, 1)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            return 2
        except click.ClickException as error:
            return _fail(error.format_message(), 2)
        except (click.Abort, KeyboardInterrupt):
            return _fail("interrupted", 130)
        except ModuleNotFoundError as error:
            line = missing_extra(error)
            if line is None:
                raise
            return _fail(line, 2)
        # Without standalone mode click hands ``ctx.exit(n)`` back as the result.
        return result if isinstance(result, int) else 0

    return main


def _fail(message: object, status: int) -> int:
    print(f"error: {_one_line(message)}", file=sys.stderr)
    return status


def json_option(function: F) -> F:
    """Add ``--json`` (parameter ``as_json``): machine-readable output on stdout, human output on stderr."""
    option = click.option(
        "--json", "as_json", is_flag=True, help="Print the result as JSON on stdout; human output goes to stderr."
    )
    return option(function)


def version_option(function: F) -> F:
    """Add ``--version``."""
    return click.version_option(__version__, message="%(prog)s %(version)s")(function)


def human_console(as_json: bool) -> Console:
    """The console for human output: stdout, or stderr when stdout carries JSON."""
    from rich.console import Console

    return Console(stderr=as_json, highlight=False)


def emit(result: dict[str, Any], as_json: bool) -> None:
    """Print the machine-readable result on stdout when ``--json`` was given; otherwise nothing."""
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False), flush=True)


def examples(*lines: str) -> str:
    """An epilog for ``--help`` that shows example command lines, each on its own line."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def lora_line(report: LoraReport) -> str:
    """One line about a LoRA that was applied, with what was skipped."""
    line = f"{report.file}: scale {report.scale:g}, {report.applied} layers changed"
    without = [name for name, count in report.graphs.items() if not count]
    if without:
        line += f"; without any of them: {', '.join(without)}"
    if report.unmatched:
        line += f"; {len(report.unmatched)} not in this model, skipped (first: {report.unmatched[0]})"
    if report.ignored:
        line += f"; {len(report.ignored)} other keys ignored (first: {report.ignored[0]})"
    return line

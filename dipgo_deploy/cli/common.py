"""What every command shares: exit statuses, one-line errors, paths of its output, ``--json`` and help examples."""

from __future__ import annotations

import errno
import functools
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dipgo_deploy.cli.options import option, options
from dipgo_deploy.errors import NotFiniteError, ToleranceError, UserError, one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

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
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt-rtx",),
    "cuda": ("tensorrt", "tensorrt-rtx"),
    "fastapi": ("serve",),
    "uvicorn": ("serve",),
    "prometheus_client": ("serve",),
    "ray": ("ray",),
    "pandas": ("ray",),
    "pyarrow": ("ray",),
}


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """One line that names the extra which brings the missing module in, or None for a module of no extra."""
    module = (error.name or "").partition(".")[0]
    extras = _EXTRA_OF_MODULE.get(module)
    if extras is None:
        return None
    from dipgo_deploy.extras import install

    return f"this needs the package {module}, which is not installed; {install(*extras)}"


def entry_point(command: click.Command) -> Callable[[Sequence[str] | None], int]:
    """Turn a click command into the ``main`` of a console script.

    ``main(argv=None)`` runs the command (``argv`` without the program's name; None takes ``sys.argv``) and returns the
    exit status: 0 done; 1 a comparison beyond tolerance, values that are not finite, output that could not be written,
    no memory left, or a status the command asked for with ``ctx.exit``; 2 a user's mistake, a file that cannot be read,
    or a missing optional package; 130 interrupted; 143 terminated and 129 hung up, after what was begun was undone. All
    are said in one line on stderr, but a closed pipe, which ends the command quietly with status 1.
    """

    def main(argv: Sequence[str] | None = None) -> int:
        for stream in (sys.stdout, sys.stderr):
            _write_anything(stream)
        with _signals_unwind():
            status = _outcome(command, argv)
        unwritten = _unwritten()
        return status if unwritten is None else _fail_to_write(unwritten, status)

    return main


class _Ended(BaseException):
    """The process was asked to end; whatever it holds is given back on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def _signals_unwind() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as an exception, so that nothing half-written stays; not in other threads."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        raise _Ended(number)

    before = {
        number: signal.signal(number, end)
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is signal.SIG_DFL
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _outcome(command: click.Command, argv: Sequence[str] | None) -> int:
    """Run the command; its exit status, errors said."""
    try:
        result = command.main(args=None if argv is None else list(argv), standalone_mode=False)
    except UserError as error:
        return _fail(error, 2)
    except (ToleranceError, NotFiniteError) as error:
        return _fail(error, 1)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        return _fail(error.format_message(), 2)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", 130)
    except _Ended as ended:
        return _fail(signal.strsignal(ended.number) or "ended", 128 + ended.number)
    except MemoryError:
        return _fail("not enough memory; use a machine with more, or ask for less at once", 1)
    except ModuleNotFoundError as error:
        line = missing_extra(error)
        if line is None:
            raise
        return _fail(line, 2)
    except OSError as error:
        unwritten = _unwritten()
        if unwritten is not None:
            return _fail_to_write(unwritten, 1)
        if error.filename is None:
            if error.errno not in (errno.ENOSPC, errno.EPIPE):
                raise
            return 1 if error.errno == errno.EPIPE else _fail(f"output cannot be written: {error.strerror}", 1)
        return _fail(f"{os.fsdecode(error.filename)}: {error.strerror or error}", 2)
    # Without standalone mode click hands ``ctx.exit(n)`` back as the result.
    return result if isinstance(result, int) else 0


def _write_anything(stream: object) -> None:
    """Let a stream write what its encoding lacks as ``\\u2588``: no output ends in a traceback."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
        with suppress(OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")


def _unwritten() -> OSError | None:
    """Why what was printed cannot be written to stdout; None where it can. What is left is then thrown away."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # Python writes it once more when it ends.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    except (AttributeError, ValueError):  # no stdout, or a closed one
        return None
    return None


def _fail_to_write(error: OSError, status: int) -> int:
    if error.errno == errno.EPIPE:  # whoever read it has enough
        return status or 1
    return _fail(f"standard output cannot be written: {error.strerror or error}", status or 1)


def _fail(message: object, status: int) -> int:
    with suppress(OSError, ValueError, AttributeError):  # the status says it, too
        print(f"error: {one_line(message, 1000)}", file=sys.stderr, flush=True)
    return status


def json_option(function: F) -> F:
    """Add ``--json`` (parameter ``as_json``): machine-readable output on stdout, human output on stderr."""
    text = "Print the result as JSON on stdout; what is for people goes to stderr."
    return option("Output", "--json", "as_json", is_flag=True, help=text)(function)


_QUIET = "dipgo.quiet"


def quiet_option(function: F) -> F:
    """Add ``--quiet``, which bars and lines of progress look for themselves."""

    def set_quiet(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        ctx.meta[_QUIET] = value

    text = "Show no progress; results, warnings and errors alone."
    return option("Output", "-q", "--quiet", is_flag=True, expose_value=False, callback=set_quiet, help=text)(function)


def _quiet() -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(_QUIET))


def reading_options(function: F) -> F:
    """Add what says how a model is read, such as ``--variant``; it becomes part of the parameter ``model``, a model's
    name."""

    @functools.wraps(function)
    def with_name(*args: Any, model: str, **parameters: Any) -> Any:
        from dipgo_deploy.models.location import ReadOptions, with_options

        chosen = {field.name: parameters.pop(field.name) for field in fields(ReadOptions)}
        return function(*args, model=with_options(model, **chosen), **parameters)

    decorate = options(
        option(
            "Model",
            "--config",
            show_default="of one file: none, and it is refused",
            help="Folder with configurations and tokenizers, for a model that is one .safetensors file.",
        ),
        option(
            "Model",
            "--variant",
            show_default="files without a variant, else the only one that there is",
            help="Variant of the weight files, such as fp16.",
        ),
        option(
            "Model",
            "--pipeline",
            show_default="the folder's own",
            help="Diffusers pipeline class whose parts are taken from a folder that holds more of them.",
        ),
        option(
            "Model",
            "--ip-adapter",
            show_default="none",
            help="IP-Adapter's .safetensors file, for a Stable Diffusion or SDXL folder.",
        ),
        option(
            "Model",
            "--image-encoder",
            show_default="image_encoder beside --ip-adapter",
            help="Folder of the image encoder that the IP-Adapter was trained with.",
        ),
    )
    return decorate(with_name)  # type: ignore[return-value]


def checked_outputs(*parameters: str) -> Callable[[F], F]:
    """Add ``--overwrite``, and hand the command paths that can be written: see ``free_output``.

    parameters: of the command, each a path or None. To be put under the options that they come from.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def run(*args: Any, overwrite: bool, **values: Any) -> Any:
            for name in parameters:
                if values[name] is not None:
                    values[name] = free_output(values[name], f"--{name}", overwrite=overwrite)
            return function(*args, **values)

        return overwrite_option(run)  # type: ignore[return-value]

    return decorate


def overwrite_option(function: F) -> F:
    """Add ``--overwrite``."""
    text = "Replace an output file that exists; without it a number is added to the name."
    return option("Output", "--overwrite", is_flag=True, help=text)(function)


def free_output(path: Path, option: str, *, overwrite: bool) -> Path:
    """``path``, or with the first number behind its name that no file has (a-1.png, a-2.png, ...), which is said.

    Raises:
        UserError: it could not be written: a missing folder, a folder, or no permission.
    """
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: the folder {path.parent} does not exist; make it first")
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder; give a file name")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{option} {path}: the folder {path.parent} cannot be written; give another")
    number = 0
    free = path
    while not overwrite and (free.exists() or free.is_symlink()):
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    if free != path:
        click.echo(f"{path} exists: writing {free.name} (--overwrite replaces it)", err=True)
    return free


def human_console(as_json: bool) -> Console:
    """The console for human output: stdout, or stderr when stdout carries JSON."""
    from rich.console import Console

    return Console(stderr=as_json, highlight=False)


@contextmanager
def progress_bars(console: Console, *facts: str) -> Iterator[Progress]:
    """Bars with count, elapsed and remaining time, gone at the end.

    Only on a terminal, and not with ``--quiet``: elsewhere Rich before 13.8 would end them with an empty line.

    Args:
        console: where they are drawn.
        facts: fields of a task that are shown behind its count.
    """
    from rich import progress as rich

    fields = [rich.TextColumn(f"{{task.fields[{fact}]}}") for fact in facts]
    times = (rich.TimeElapsedColumn(), rich.TimeRemainingColumn())
    counted = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn())
    bars = rich.Progress(*counted, *fields, *times, console=console, transient=True)
    if not console.is_terminal or _quiet():
        yield bars
        return
    with bars:
        yield bars


def progress_lines(console: Console) -> Callable[[str], None]:
    """Takes lines that stand in for a bar where there is no terminal: printed with the seconds since now, and not with
    ``--quiet``."""
    start = time.perf_counter()

    def tell(line: str) -> None:
        if not console.is_terminal and not _quiet():
            console.print(f"[{time.perf_counter() - start:6.1f} s] {line}", markup=False, soft_wrap=True)

    return tell


@contextmanager
def stages(console: Console, first: str, *, lines: bool = False) -> Iterator[Callable[[str], None]]:
    """What runs now, with the time since the beginning, on a terminal; it is told the name of each stage.

    first: what runs until it is told. lines: a plain line for each stage where there is no terminal.
    """
    with stage_bar(console, first, lines=lines) as report:
        yield lambda stage: report(stage, 0, 0)


@contextmanager
def stage_bar(
    console: Console, first: str = "starting", *, lines: bool = True
) -> Iterator[Callable[[str, int, int], None]]:
    """A bar, which is told (stage, done, total), 0 where that is not known; a plain line for each stage where there is
    no terminal, unless ``lines`` is off."""
    tell = progress_lines(console)
    with progress_bars(console) as bars:
        task = bars.add_task(first, total=None)
        current = ""

        def report(stage: str, done: int, total: int) -> None:
            nonlocal current
            if stage != current:
                current = stage
                bars.reset(task, description=stage, total=total or None)
                if lines:
                    tell(stage)
            bars.update(task, completed=done, total=total or None)

        yield report


def drawable(console: Console, characters: str, plain: str) -> str:
    """The characters that are wanted, or plain ones where the console's encoding lacks any of them."""
    try:
        characters.encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return plain
    return characters


def emit(result: dict[str, Any], as_json: bool) -> None:
    """Print the machine-readable result on stdout when ``--json`` was given; otherwise nothing."""
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False), flush=True)


def examples(*lines: str) -> str:
    """An epilog for ``--help`` that shows example command lines, each on its own line."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def lora_line(report: LoraReport) -> str:
    """One line about a LoRA that was applied, with what was left out."""
    shares = [f"{part.applied} of {part.layers} layers of the {part.component}" for part in report.components]
    where = f" (the denoiser is {report.denoiser})" if report.denoiser else ""
    line = f"{report.file}: scale {report.scale:g}, applied {', '.join(shares)}{where}"
    for part in report.components:
        if part.not_computed:
            line += f"; nothing here depends on {_first(part.not_computed)} of the {part.component}"
        if part.not_applied:
            line += f"; left out, as this model has no such layers: {_first(part.not_applied)} of the {part.component}"
    if report.left_out:
        line += f"; left out, as not supported: {_first(report.left_out)}"
    without = [name for name, count in report.graphs.items() if not count]
    if without:
        line += f"; graphs without any of them: {', '.join(without)}"
    return one_line(line, 1000)


def _first(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def lora_options(purpose: str) -> Callable[[F], F]:
    """``--lora`` (parameter ``loras``), to be used as ``purpose`` says, and ``--lora-partial``."""
    return options(
        option(
            "LoRA",
            "--lora",
            "loras",
            multiple=True,
            metavar="[DENOISER=]FILE[:SCALE]",
            show_default="none; scale 1",
            help=f"LoRA file or folder (safetensors) {purpose}; can be given several times. Of a model of two "
            "denoisers it is for the first, or for transformer_2 as in transformer_2=FILE.",
        ),
        option(
            "LoRA",
            "--lora-partial",
            is_flag=True,
            help="Apply what fits of a LoRA file and say what was left out; else a file that does not fit whole is "
            "refused.",
        ),
    )

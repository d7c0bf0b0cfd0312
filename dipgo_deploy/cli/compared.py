"""What ``dipgo-compare`` found, told: on the terminal, in files, as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dipgo_deploy.cli.common import emit, human_console
from dipgo_deploy.errors import NotFiniteError, ToleranceError, UserError
from dipgo_deploy.files import write_atomic

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from dipgo_deploy.compare.metrics import TensorError
    from dipgo_deploy.compare.report import Part, Report
    from dipgo_deploy.compare.worst import Pair


@dataclass(frozen=True)
class Outputs:
    """Where a comparison is told: the terminal, files, JSON on stdout."""

    engine_dir: Path
    junit: Path | None
    html: Path | None
    as_json: bool

    def write(
        self,
        report: Report,
        facts: dict[str, Any],
        error: UserError | NotFiniteError | None,
        pictures: Sequence[Pair],
    ) -> None:
        """Tell what was found; facts: of the whole, for machines; pictures: for the page.

        Raises:
            UserError, NotFiniteError: ``error``. ToleranceError: something is beyond tolerance.
        """
        console = human_console(self.as_json)
        failure = str(error) if error is not None else report.first_failure()
        if error is None:
            show(console, report, facts.get("model", self.engine_dir.name))
        if bisected := facts.get("bisect"):
            console.print(bisected["line"], markup=False, soft_wrap=True)
            if "folder" in bisected:
                console.print(f"{bisected['folder']}: {bisected['command']}", markup=False, soft_wrap=True)
        told = {
            **facts,
            **report.as_dict(),
            "passed": failure is None,
            "error": None if error is None else str(error),
        }
        name = self.engine_dir.resolve().name
        if self.junit is not None:
            from dipgo_deploy.compare.junit import junit_xml, properties

            write_atomic(self.junit, junit_xml(name, report, properties(told), error))
            console.print(f"{self.junit}: test cases", markup=False, soft_wrap=True)
        if self.html is not None:
            from dipgo_deploy.compare.html import html_page

            write_atomic(self.html, html_page(name, report, told, pictures, error))
            console.print(f"{self.html}: the page", markup=False, soft_wrap=True)
        emit(told, self.as_json)
        if error is not None:
            raise error
        if failure is not None:
            raise ToleranceError(failure)


def show(console: Console, report: Report, model: str) -> None:
    """Tables of graphs and loop, and a line for all else; model: of what."""
    from dipgo_deploy.compare.report import collapsed

    for part in report.parts:
        _show_part(console, part)
    if report.variants:
        table = _table(f"{model}: variants by themselves", "variant", "step", "tensors", "worst tensor")
        for checked in report.variants:
            worst = checked.worst
            cells = [str(checked.variant), str(checked.step), str(len(checked.tensors)), worst.name]
            table.add_row(*cells, *_numbers(worst))
        console.print(table)
    if report.loop:
        crossed = any(tensor.carried is not None for checked in report.loop for tensor in checked.tensors)
        table = _table(f"{model}: the whole loop", "step", "variant", "tensor", crossed=crossed)
        for run in collapsed(report.loop):
            first = run[0]
            if first.variant is None:
                # What is used again is compared with what the model makes of it each time.
                worst = max(run, key=lambda checked: (not checked.passed, checked.worst.relative)).worst
                steps = f"{first.step}-{run[-1].step}" if len(run) > 1 else str(first.step)
                table.add_row(steps, "no launch", worst.name, *_numbers(worst, crossed=crossed))
                continue
            for tensor in first.tensors:
                table.add_row(str(first.step), first.variant, tensor.name, *_numbers(tensor, crossed=crossed))
        console.print(table)
    tensors = report.results.tensors if report.results is not None else ()
    for tensor in tensors:
        console.print(
            f"{tensor.name}: largest error {tensor.relative:.2e} of the largest value, "
            f"cosine {tensor.cosine:.9f}, PSNR {tensor.psnr:.1f} dB",
            markup=False,
            soft_wrap=True,
        )
    for part in report.pictures:
        _show_part(console, part)
    for line in report.skipped:
        console.print(line, markup=False, soft_wrap=True)
    if report.passed:
        console.print(f"everything is within {report.tolerance.relative:g} of {report.reference}", markup=False)


def _show_part(console: Console, part: Part) -> None:
    """One line; what is wrong with it is in the error at the end."""
    if part.passed and part.tensors:
        worst = max(part.tensors, key=lambda tensor: tensor.relative)
        found = f"{worst.name} within {worst.relative:.2e}" if worst.relative else "equal"
    else:
        found = "equal" if part.passed else "DIFFERENT"
    console.print(f"{part.where}: {found} ({part.reference})", markup=False, soft_wrap=True)


def _table(title: str, *headings: str, crossed: bool = False) -> Table:
    from rich.table import Table

    table = Table(title=title)
    for heading in headings:
        right = heading in ("step", "tensors")
        table.add_column(heading, justify="right" if right else "left", no_wrap=right, overflow="fold")
    for heading in ("error", "relative", *(("made", "inherited") if crossed else ()), "cosine", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _numbers(tensor: TensorError, *, crossed: bool = False) -> list[str]:
    parts = (tensor.made, tensor.carried) if crossed else ()
    return [
        f"{tensor.max_absolute:.2e}",
        f"{tensor.relative:.2e}",
        *("" if part is None else f"{part:.2e}" for part in parts),
        f"{tensor.cosine:.7f}",
        _verdict(tensor),
    ]


def _verdict(tensor: TensorError) -> str:
    if not tensor.passed:
        return "[bold red]beyond[/]"
    return "ok" if tensor.made is None or tensor.relative <= tensor.limit else "inherited"

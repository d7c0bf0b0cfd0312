"""A picture of a measurement. Needs matplotlib (extra ``bench``), imported only here."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from dipgo_deploy.bench.quality import Row
from dipgo_deploy.errors import UserError
from dipgo_deploy.extras import install

_COSTS: tuple[tuple[str, Callable[[Row], float]], ...] = (
    ("launches", lambda row: row.launches),
    ("GMACs of one image's denoising", lambda row: row.macs / 1e9),
    ("ms of one image's loop in torch", lambda row: row.milliseconds),
)

# Of an SSIM: what is far from the full run hides the differences of what is near.
_BOTTOM = 0.8


def check_plot(path: Path) -> None:
    """Refuse (UserError) a plot that could not be written, before anything is measured."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"--plot: needs matplotlib; {install('bench')}") from error
    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise UserError(f"--plot {path}: give a file ending in one of {', '.join(sorted(kinds))}")
    if not path.parent.is_dir():
        raise UserError(f"--plot {path}: the folder {path.parent} does not exist; make it first")


def plot_quality(rows: Sequence[Row], path: Path, title: str) -> None:
    """SSIM to the full run over launches, multiply-accumulates and time, with 95% intervals; plain solvers of one kind
    are joined by a line. The file appears when it is complete."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 5.5), layout="constrained")
    panels = figure.subplots(1, len(_COSTS), sharey=True)
    series: dict[str, list[Row]] = {}
    for row in rows:
        # "ddim, 7 steps" and "ddim, 10 steps" are one series.
        series.setdefault(row.name.split(",")[0] if row.baseline else row.name, []).append(row)
    for axes, (label, cost) in zip(panels, _COSTS, strict=True):
        for place, (name, members) in enumerate(series.items()):
            axes.errorbar(
                [cost(row) for row in members],
                [row.ssim.value for row in members],
                yerr=[
                    [row.ssim.value - row.ssim.low for row in members],
                    [row.ssim.high - row.ssim.value for row in members],
                ],
                marker="osD^v<>P*Xhp"[place % 12],
                capsize=3,
                linestyle=":" if members[0].baseline else "none",
                label=Path(name).name,
            )
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    label = "SSIM to the full run, same seeds (95% interval)"
    if max(row.ssim.value for row in rows) > _BOTTOM > min(row.ssim.low for row in rows):
        panels[0].set_ylim(_BOTTOM, 1 + (1 - _BOTTOM) / 20)
        label += f"; below {_BOTTOM:g} is not shown"
    panels[0].set_ylabel(label)
    figure.suptitle(title)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize="small", loc="outside lower center", ncols=4)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        aside = Path(folder) / path.name
        figure.savefig(aside, dpi=150)
        aside.replace(path)

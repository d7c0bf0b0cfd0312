"""A picture of a measurement. Needs matplotlib (extra ``bench``), imported only here."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from dipgo_deploy.bench.quality import Row
from dipgo_deploy.errors import UserError


def check_plot(path: Path) -> None:
    """Refuse (UserError) a plot that could not be written, before anything is measured."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--plot: needs matplotlib: pip install 'dipgo-deploy[bench]'") from error
    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise UserError(f"--plot {path}: give a file ending in one of {', '.join(sorted(kinds))}")
    if not path.parent.is_dir():
        raise UserError(f"--plot {path}: the folder {path.parent} does not exist: make it first")


def plot_quality(rows: Sequence[Row], path: Path, title: str) -> None:
    """SSIM to the full run over the cost, with 95% intervals; the file appears when it is complete."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        axes.errorbar(
            [row.macs / 1e9],
            [row.ssim.value],
            yerr=[[row.ssim.value - row.ssim.low], [row.ssim.high - row.ssim.value]],
            marker="osD^v<>P*Xhp"[place % 12],
            capsize=3,
            linestyle="none",
            label=row.name,
        )
    axes.set_xlabel("GMACs of one image's denoising")
    axes.set_ylabel("SSIM to the full run, same seeds (95% interval)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        aside = Path(folder) / path.name
        figure.savefig(aside, dpi=150)
        aside.replace(path)

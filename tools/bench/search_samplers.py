"""Which sampler and how many steps a schedule that stands for another run may have: the uniform interval over each.

Run from the repository's root: ``python -m tools.bench.search_samplers --model fashion-sd --reference ddim:50 --ratio
0.6 --images 20 --out samplers.json``. The images are those that a search with as many looks at, so its losses can be
compared with these. A row is written as soon as it is known; what is in the file already is not run again.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from dipgo_deploy.cli.common import emit, entry_point, human_console, json_option


def spread(launches: int, most: int) -> tuple[int, ...]:
    """Numbers of steps to spread so many launches over: as many, up to three more, and 1.5, 2 and 3 times as many."""
    wanted = (*range(launches, launches + 4), 3 * launches // 2, 2 * launches, 3 * launches)
    return tuple(sorted({steps for steps in wanted if steps <= most}))


@click.command(name="search_samplers")
@click.option("--model", default="fashion-dit", show_default=True)
@click.option("--reference", default="ddim:50", show_default=True, help="Sampler and steps of the full run.")
@click.option("--ratio", "ratios", type=float, multiple=True, default=(0.4, 0.6, 0.8, 0.85), show_default=True)
@click.option("--sampler", "samplers", multiple=True, default=("deis", "dpm++2m", "unipc", "ddim"), show_default=True)
@click.option("--steps", "numbers", type=click.IntRange(min=1), multiple=True, help="[default: see `spread`]")
@click.option("--most", type=click.IntRange(min=1), help="Most steps.  [default: no limit]")
@click.option("--cache", type=click.Choice(["output", "residual"]))
@click.option("--guidance-scale", type=float, default=4.0, show_default=True)
@click.option("--images", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True)
@json_option
def command(
    model: str,
    reference: str,
    ratios: tuple[float, ...],
    samplers: tuple[str, ...],
    numbers: tuple[int, ...],
    most: int | None,
    cache: Any,
    guidance_scale: float,
    images: int,
    out: Path,
    as_json: bool,
) -> None:
    """Losses of the uniform interval over the steps of other samplers, one thread."""
    import torch

    from dipgo_deploy.bench.statistics import mean
    from dipgo_deploy.reference.quiet import quiet_libraries
    from dipgo_deploy.search.baselines.uniform import uniform_gates
    from dipgo_deploy.search.evaluate import full_latents, images_of, sample
    from dipgo_deploy.search.losses import ssim
    from dipgo_deploy.search.problem import ProblemOptions, load_problem, sampler_and_steps, with_reference
    from dipgo_deploy.search.problem import with_sampler as use_sampler
    from dipgo_deploy.search.run import SearchOptions, judged

    quiet_libraries()
    torch.set_num_threads(1)
    console = human_console(as_json)
    run = sampler_and_steps(reference, "--reference")
    base = load_problem(ProblemOptions(model, *run, guidance_scale=guidance_scale, cache=cache))
    pairs = judged(base, SearchOptions(images=images))
    full = images_of(base, full_latents(base, pairs))
    rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else []
    for ratio in ratios:
        launches = sum(any(row) for row in uniform_gates(base.costs, ratio))
        for sampler in samplers:
            for steps in numbers or spread(launches, most or 3 * launches):
                if steps < launches:
                    continue
                row: dict[str, Any] = {"ratio": ratio, "sampler": sampler, "steps": steps, "images": images}
                if any(row.items() <= known.items() for known in rows):
                    continue
                begin = time.perf_counter()
                problem = with_reference(use_sampler(base, sampler, steps), *run)
                gates = uniform_gates(problem.costs, ratio)
                loss = mean(1 - ssim(images_of(problem, sample(problem, gates, pairs)), full).double().numpy())
                row |= {"achieved": problem.costs.ratio(gates), "loss": loss.value, "half": loss.high - loss.value}
                row |= {"seconds": time.perf_counter() - begin}
                rows.append(row)
                out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
                console.print(json.dumps(row), markup=False, soft_wrap=True)
    emit({"rows": len(rows), "out": str(out)}, as_json)


main = entry_point(command)

if __name__ == "__main__":
    raise SystemExit(main(None))

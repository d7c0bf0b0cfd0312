"""What a schedule has to satisfy, each rule a function that raises one line naming evaluation and block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dipgo_deploy.errors import UserError

if TYPE_CHECKING:
    from pydantic import ValidationError

_SHOWN_HASH_DIGITS = 12
# Far above any model and sampler; what is larger would be validated for minutes before it is refused.
MAX_BLOCKS = 10_000
MAX_EVALUATIONS = 10_000
MAX_GATES = 4_000_000
# Of the run's guidance.
MAX_GUIDANCE = 100.0
_MAX_FIELDS = 100


def check_sizes(document: Mapping[str, Any]) -> None:
    """Refuse lists and objects too large for a schedule before each of their values is looked at."""
    blocks, keep = document.get("blocks"), document.get("keep")
    solver, forecast = document.get("solver"), document.get("forecast")
    lists = {"blocks": (blocks, MAX_BLOCKS), "keep": (keep, MAX_EVALUATIONS)}
    lists |= {name: (document.get(name), MAX_EVALUATIONS) for name in ("denoisers", "guidance")}
    if isinstance(solver, Mapping):
        lists |= {f"solver.{name}": (solver.get(name), MAX_EVALUATIONS) for name in ("timesteps", "rows", "final")}
    if isinstance(forecast, Mapping):
        lists |= {f"forecast.{name}": (forecast.get(name), MAX_EVALUATIONS) for name in ("positions", "weights")}
        rows = forecast.get("weights")
        if isinstance(rows, (list, tuple)) and len(rows) <= MAX_EVALUATIONS:
            lists |= {
                f"forecast.weights.{place}": (row, len(blocks) if isinstance(blocks, (list, tuple)) else MAX_BLOCKS)
                for place, row in enumerate(rows)
            }
    for name, (value, most) in lists.items():
        if isinstance(value, (list, tuple)) and len(value) > most:
            raise UserError(f"{name}: {len(value):,} entries, more than the {most:,} that a schedule can have")
    parts = {
        "the document": document,
        **{name: document.get(name) for name in ("model", "sampler", "solver", "forecast")},
    }
    if isinstance(blocks, (list, tuple)):
        parts |= {f"blocks.{place}": block for place, block in enumerate(blocks)}
        rows = len(keep) if isinstance(keep, (list, tuple)) else 0
        if len(blocks) * rows > MAX_GATES:
            raise UserError(
                f"keep: {len(blocks):,} blocks at {rows:,} evaluations, more than {MAX_GATES:,} gates in all"
            )
    for name, part in parts.items():
        if isinstance(part, Mapping) and len(part) > _MAX_FIELDS:
            raise UserError(f"{name}: {len(part):,} fields, which no schedule has")


def check_names(names: Sequence[str]) -> None:
    """Refuse an empty block list and a block that is listed twice."""
    if not names:
        raise UserError("blocks: the list is empty; name at least one block")
    seen: dict[str, int] = {}
    for position, name in enumerate(names):
        if name in seen:
            raise UserError(f"blocks: {name} is listed twice (positions {seen[name]} and {position}); remove one")
        seen[name] = position


def check_rows(rows: Sequence[str], names: Sequence[str], steps: int) -> None:
    """Refuse a keep matrix that is not ``steps`` rows of one 0 or 1 a block."""
    if len(rows) != steps:
        raise UserError(f"keep: {len(rows)} rows, but steps is {steps}; give one row for each evaluation")
    for step, row in enumerate(rows):
        for column, cell in enumerate(row[: len(names)]):
            if cell not in "01":
                raise UserError(f"keep: evaluation {step}, block {names[column]}: {cell!r} is not 0 or 1")
        if len(row) < len(names):
            raise UserError(
                f"keep: evaluation {step} has {len(row)} cells, block {names[len(row)]} is the first without one; "
                f"give {len(names)}, one a block"
            )
        if len(row) > len(names):
            raise UserError(f"keep: evaluation {step} has {len(row)} cells, but there are {len(names)} blocks")


def check_caches_written(gates: Iterable[Sequence[bool]], names: Sequence[str], runs: Sequence[Sequence[bool]]) -> None:
    """Refuse a removed block whose cache was never written by an earlier evaluation. runs: where its denoiser does."""
    written = [False] * len(names)
    for step, row in enumerate(gates):
        for column, kept in enumerate(row):
            if kept:
                written[column] = True
            elif runs[step][column] and not written[column]:
                first = next(place for place, there in enumerate(runs) if there[column])
                raise UserError(
                    f"keep: evaluation {step}, block {names[column]}: its cache is read before it was ever written; "
                    f"keep the block at evaluation {first}"
                )


def check_guidance(guidance: Sequence[float], steps: int) -> None:
    """Refuse another number of entries than of evaluations."""
    if len(guidance) != steps:
        raise UserError(f"guidance: {len(guidance)} numbers for {steps} evaluations; give one each")


def check_halves(
    gates: Iterable[Sequence[bool]],
    names: Sequence[str],
    runs: Sequence[Sequence[bool]],
    conditional_only: Sequence[bool],
) -> None:
    """Refuse a removed block at a guided evaluation whose cache a conditional-only one wrote. runs: where its denoiser
    does."""
    found = missing_halves(gates, runs, conditional_only)
    if found:
        step, column, written = found[0]
        raise UserError(
            f"keep: evaluation {step}, block {names[column]}: is guided, and its cache has no unconditional half: "
            f"evaluation {written} wrote it, which is conditional only; keep the block at evaluation {step}, or remove "
            f"it at {written}"
        )


def missing_halves(
    gates: Iterable[Sequence[bool]], runs: Sequence[Sequence[bool]], conditional_only: Sequence[bool]
) -> list[tuple[int, int, int]]:
    """Guided reads of caches without an unconditional half: evaluation, block, and the evaluation that wrote it. A
    block counts as kept there for what follows."""
    found: list[tuple[int, int, int]] = []
    written: dict[int, int] = {}
    for step, row in enumerate(gates):
        for column, kept in enumerate(row):
            lacks = column in written and conditional_only[written[column]] and not conditional_only[step]
            if not kept and runs[step][column] and lacks:
                found.append((step, column, written[column]))
                kept = True
            if kept:
                written[column] = step
    return found


def check_denoisers(denoisers: Sequence[str], names: Sequence[str], gates: Sequence[Sequence[bool]]) -> None:
    """Refuse another number of denoisers than of evaluations, one without blocks, and a block that is kept where its
    own denoiser does not run."""
    if len(denoisers) != len(gates):
        raise UserError(f"denoisers: {len(denoisers)} for {len(gates)} evaluations; give one each")
    for step, (denoiser, row) in enumerate(zip(denoisers, gates, strict=True)):
        if not any(name.startswith(f"{denoiser}.") for name in names):
            raise UserError(f"denoisers: evaluation {step}: no block's name begins with {denoiser[:60]}.")
        for name, kept in zip(names, row, strict=True):
            if kept and not name.startswith(f"{denoiser}."):
                raise UserError(
                    f"keep: evaluation {step}, block {name}: is kept, but the evaluation runs {denoiser[:60]}; write 0"
                )


def check_denoisers_known(denoisers: Sequence[str] | None, known: Sequence[str]) -> None:
    """Refuse denoisers that are not the model's; none where it has one. known: of the model, one of none is ''."""
    if denoisers is None and len(known) > 1:
        raise UserError(f"denoisers: missing; this model runs {' and '.join(known)} in turn; name one an evaluation")
    for step, denoiser in enumerate(denoisers or ()):
        if denoiser not in known or not denoiser:
            here = " and ".join(known) if len(known) > 1 else "one only"
            raise UserError(f"denoisers: evaluation {step}: {denoiser[:60]} is none of this model, which has {here}")


def check_block_names(names: Sequence[str], model_names: Sequence[str]) -> None:
    """Refuse blocks that are not the model's own, all of them, in its order of execution."""
    known, given = set(model_names), set(names)
    for name in names:
        if name not in known:
            raise UserError(f"blocks: {name} is no block of this model (it has {_some(model_names)})")
    for name in model_names:
        if name not in given:
            raise UserError(f"blocks: {name} of this model is missing")
    check_names(names)
    for position, (name, expected) in enumerate(zip(names, model_names, strict=True)):
        if name != expected:
            raise UserError(
                f"blocks: {name} stands at position {position}, where the model runs {expected}; "
                f"list the blocks in order of execution"
            )


def check_cache_kinds(kinds: Mapping[str, str], supported: Mapping[str, Sequence[str]]) -> None:
    """Refuse a cache kind that its block does not support."""
    for name, kind in kinds.items():
        if kind not in supported[name]:
            raise UserError(f"blocks: {name} cannot have a cache of kind {kind!r}, only {' or '.join(supported[name])}")


def check_config_hash(recorded: str, accepted: Sequence[str], *, allow_other: bool = False) -> None:
    """Refuse a schedule that was made for another model's configuration, unless ``allow_other``."""
    if recorded not in accepted and not allow_other:
        raise UserError(
            f"model.config_hash: made for the configuration {recorded[:_SHOWN_HASH_DIGITS]}..., this model has "
            f"{accepted[0][:_SHOWN_HASH_DIGITS]}...; make a schedule for it, or allow another configuration"
        )


def check_steps(steps: int, evaluations: int, sampler: str, num_inference_steps: int) -> None:
    """Refuse a number of rows that is not the sampler's number of evaluations of the denoiser."""
    if steps != evaluations:
        raise UserError(
            f"steps: {steps} rows, but {sampler} with {num_inference_steps} steps evaluates the denoiser "
            f"{evaluations} times; give {evaluations} rows"
        )


def one_line(error: ValidationError) -> str:
    """The first mistake of a pydantic error as ``field: what``, with the number of further ones."""
    mistakes = error.errors(include_url=False, include_context=False)
    first = mistakes[0]
    where = ".".join(str(part) for part in first["loc"]) or "the document"
    value = first.get("input")
    hidden = first["type"] in ("missing", "extra_forbidden") or isinstance(value, (dict, list))
    shown = "" if hidden else f", not {repr(value)[:60]}"
    more = f" ({len(mistakes)} mistakes in all)" if len(mistakes) > 1 else ""
    return f"{where}: {first['msg']}{shown}{more}"


def _some(names: Sequence[str], shown: int = 4) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")

"""cache-dit's DBCache with a static mask of steps: its configuration as YAML or JSON.

What is read is ``cache_config`` (or the whole file, as older ones have it): ``steps_computation_mask`` with 1 for a
step that computes (or the name of a policy: slow, medium, fast, ultra), ``steps_computation_policy``,
``Fn_compute_blocks`` (8) and ``Bn_compute_blocks`` (0), ``enable_taylorseer`` and ``taylorseer_order``, or
``enable_foca``. At a step with 0 the first Fn and the last Bn blocks of each list of blocks compute (FLUX has two
lists), and between them the last residual of the others together is added, which is the sum of theirs; with TaylorSeer
or FoCa it is extrapolated first.
With the policy ``dynamic``, which is theirs if none is said, or without a mask, a threshold on data decides: that is
refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dipgo_deploy.documents import parse
from dipgo_deploy.errors import UserError, one_line
from dipgo_deploy.schedule.forecast import MOST_TERMS
from dipgo_deploy.schedule.importers.base import Imported, Importer, Source, check_only_gates, check_steps_of
from dipgo_deploy.schedule.importers.foca import reads as foca_reads
from dipgo_deploy.schedule.importers.linear import as_forecast
from dipgo_deploy.schedule.importers.settings import Settings
from dipgo_deploy.schedule.importers.stacks import outer, stacks_of
from dipgo_deploy.schedule.importers.taylorseer import reads, rule_of

if TYPE_CHECKING:
    from dipgo_deploy.schedule.document import Schedule

_STATIC = "give a steps_computation_mask with the policy static, which is the nearest that can be compiled"
# Lengths of runs of steps that compute, and of those between them that do not, by the least number of steps that they
# are for. They are cut at the end to the number of steps; those for 16 are stretched for more than 28.
_POLICIES: tuple[tuple[int, dict[str, tuple[tuple[int, ...], tuple[int, ...]]]], ...] = (
    (
        16,
        {
            "slow": ((8, 3, 3, 2, 1, 1), (1, 2, 2, 2, 3)),
            "medium": ((6, 2, 2, 2, 2, 1), (1, 3, 3, 3, 3)),
            "fast": ((6, 1, 1, 1, 1, 1), (1, 3, 4, 5, 4)),
            "ultra": ((4, 1, 1, 1, 1), (2, 5, 6, 7)),
        },
    ),
    (
        10,
        {
            "slow": ((4, 2, 2, 2, 1), (1, 1, 1, 1)),
            "medium": ((4, 2, 1, 1, 1), (1, 1, 2, 2)),
            "fast": ((3, 1, 1, 1, 1), (1, 2, 2, 3)),
            "ultra": ((2, 1, 1, 1, 1), (1, 2, 3, 3)),
        },
    ),
    (
        9,
        {
            "slow": ((5, 2, 1), (1,)),
            "medium": ((5, 1, 1), (1, 1)),
            "fast": ((4, 1, 1), (1, 2)),
            "ultra": ((3, 1, 1), (2, 2)),
        },
    ),
    (
        8,
        {
            "slow": ((5, 1, 1), (1,)),
            "medium": ((4, 1, 1), (1, 1)),
            "fast": ((3, 1, 1), (1, 2)),
            "ultra": ((2, 1, 1), (2, 2)),
        },
    ),
    (6, dict.fromkeys(("slow", "medium", "fast", "ultra"), ((3, 1), (2,)))),
    (4, dict.fromkeys(("slow", "medium", "fast", "ultra"), ((2, 1), (1,)))),
)
_SHORTEST_OF_RUNS = 28
_MOST_YAML, _MOST_BRACKETS = 16 * 1024, 100


def policy_mask(policy: str, steps: int) -> tuple[bool, ...]:
    """The mask of one of cache-dit's policies for a number of steps. Raises UserError where it has none."""
    least, known = next(((least, bins) for least, bins in _POLICIES if least <= steps), (0, {}))
    if policy not in known or (steps < 8 and steps != least):
        raise UserError(f"steps_computation_mask: {policy[:40]!r} is no policy of cache-dit for {steps} steps")
    runs, gaps = (list(lengths) for lengths in known[policy])
    if steps > _SHORTEST_OF_RUNS:
        _stretch(runs, gaps, steps)
    while sum(runs) + sum(gaps) > steps:
        for lengths in (gaps, runs):
            if lengths and sum(runs) + sum(gaps) > steps:
                lengths[-1] -= 1
                if not lengths[-1]:
                    lengths.pop()
    mask: list[bool] = []
    for place in range(max(len(runs), len(gaps))):
        mask += [True] * (runs[place] if place < len(runs) else 0)
        mask += [False] * (gaps[place] if place < len(gaps) else 0)
    return (*mask[: steps - 1], True)


def _stretch(runs: list[int], gaps: list[int], steps: int) -> None:
    """Make the lengths longer by turns, each by its own share, until they cover all steps."""
    share = steps / _SHORTEST_OF_RUNS * 0.5
    more_runs, more_gaps = ([max(int(length * share), 1) for length in lengths] for lengths in (runs, gaps))
    while True:
        for place in range(min(len(runs), len(gaps))):
            for lengths, more in ((runs, more_runs), (gaps, more_gaps)):
                lengths[place] += more[place]
                if sum(runs) + sum(gaps) >= steps:
                    return
        runs[-1] += 1
        if sum(runs) + sum(gaps) >= steps:
            return


def _document(data: bytes) -> dict[str, Any]:
    try:
        document = parse(data)
    except ValueError as reason:
        document = _yaml(data, str(reason))
    if not isinstance(document, dict):
        raise UserError("is no object with cache_config")
    config = document.get("cache_config", document)
    if not isinstance(config, dict) or not all(isinstance(name, str) for name in config):
        raise UserError("cache_config: is no object")
    return config


def _yaml(data: bytes, reason: str) -> Any:
    """YAML without tags and references, which makes nothing but plain data."""
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as error:
        from dipgo_deploy.extras import install

        raise UserError(f"not JSON ({reason}), and YAML needs another package; {install('export')}") from error
    if len(data) > _MOST_YAML:
        raise UserError(f"not JSON ({reason}), and {len(data):,} bytes of YAML are more than any configuration needs")
    if data.count(b"[") + data.count(b"{") > _MOST_BRACKETS:
        raise UserError(f"not JSON ({reason}), and as YAML nested deeper than any configuration needs")
    try:
        text = data.decode("utf-8")
        tokens = yaml.scan(text, Loader=yaml.SafeLoader)
        unusual = (yaml.AliasToken, yaml.AnchorToken, yaml.TagToken)
        if any(isinstance(token, unusual) for token in tokens):
            raise UserError("has references or tags, which no configuration needs: refused")
        return yaml.safe_load(text)
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"neither JSON ({reason}) nor YAML ({one_line(error, 80)})") from error


def _read(data: bytes, source: Source) -> Imported:
    settings = Settings(_document(data), "cache-dit's DBCache")
    kind = settings.value("cache_type", "DBCache")
    if kind != "DBCache":
        raise UserError(f"cache_type: {repr(kind)[:40]} decides on data which blocks run, block by block; {_STATIC}")
    names = ("Fn_compute_blocks", "Bn_compute_blocks")
    first, last = (settings.integer(name, default) for name, default in zip(names, (8, 0), strict=True))
    check_steps_of(settings, "num_inference_steps", source)
    if "steps_computation_mask" not in settings:
        raise UserError(f"steps_computation_mask: is missing, so a threshold on data decides; {_STATIC}")
    if settings.value("steps_computation_policy", "dynamic") != "static":
        raise UserError(f"steps_computation_policy: is dynamic, so a threshold on data decides; {_STATIC}")
    if settings.flag("enable_dmd", False):
        raise UserError("enable_dmd: is true, which fits exponentials to the sample's own past; give enable_foca")
    foca = settings.flag("enable_foca", False)
    taylor = settings.flag("enable_taylorseer", False)
    if foca and taylor:
        raise UserError("enable_foca: is true, and so is enable_taylorseer; cache-dit takes one of them")
    order = settings.integer("taylorseer_order", 1, most=MOST_TERMS - 1) if taylor else None
    name = "enable_encoder_foca" if foca else "enable_encoder_taylorseer"
    text = settings.flag(name, False)
    if foca and settings.value("calibrator_cache_type", "residual") != "residual":
        raise UserError("calibrator_cache_type: is hidden_states; give residual")
    # Those of the other one, and what only FoCa looks at.
    settings.ignore("enable_encoder_foca", "enable_encoder_taylorseer", "calibrator_cache_type")
    if settings.value("taylorseer_cache_type", "residual") != "residual":
        raise UserError("taylorseer_cache_type: is hidden_states; give residual")
    # With a static mask none of these is looked at.
    settings.ignore("residual_diff_threshold", "max_warmup_steps", "warmup_interval", "max_cached_steps")
    settings.ignore("max_continuous_cached_steps", "max_accumulated_residual_diff_threshold", "taylorseer_order")
    settings.ignore("enable_separate_cfg", "cfg_compute_first", "cfg_diff_compute_separate")
    if "force_refresh_step_hint" in settings:
        raise UserError("force_refresh_step_hint: is not supported; give a mask with a 1 at that step")
    settings.ignore("force_refresh_step_policy")
    given = settings.value("steps_computation_mask")
    settings.done()
    policy = isinstance(given, str) and given.isalpha()
    mask = policy_mask(given, source.steps) if policy else settings.mask("steps_computation_mask")
    if len(mask) != source.steps:
        raise UserError(f"steps_computation_mask: {len(mask)} entries, but the sampler evaluates {source.steps} times")
    kept = outer(source.names, first, last, "Fn_compute_blocks and Bn_compute_blocks")
    gates = tuple(tuple(run or name in kept for name in source.names) for run in mask)
    if order is None and not foca:
        return Imported(gates)
    removed = [name not in kept for name in source.names]
    if order is None:
        forecast = as_forecast(mask, foca_reads(mask), removed)
    else:
        forecast = as_forecast(mask, reads(mask, order, 2), removed, rule_of(order))
    notes = () if text else (f"the text's part of a block is extrapolated with the picture's ({name})",)
    return Imported(gates, forecast, notes=notes)


def config_of(schedule: Schedule) -> str:
    """The configuration that computes what a schedule does. Raises UserError where none does."""
    check_only_gates(schedule, "residual")
    names = schedule.block_names
    partly = {row for row in schedule.gates if not all(row)}
    if len(partly) > 1:
        raise UserError("evaluations differ in which blocks they skip; one set of blocks for all can be said")
    kept = {name for name, cell in zip(names, next(iter(partly), ()), strict=False) if cell}
    first, last = _counts([[name in kept for name in blocks] for blocks in stacks_of(names).values()])
    if partly and outer(names, first, last, "blocks") != kept:
        raise UserError("the blocks that run at skipped evaluations are not the first and the last ones of each list")
    config = {
        "cache_type": "DBCache",
        "Fn_compute_blocks": first,
        "Bn_compute_blocks": last,
        "num_inference_steps": schedule.steps,
        "steps_computation_mask": [int(all(row)) for row in schedule.gates],
        "steps_computation_policy": "static",
    }
    return json.dumps({"cache_config": config}, indent=2) + "\n"


def _counts(stacks: Sequence[Sequence[bool]]) -> tuple[int, int]:
    """How many blocks at the beginning and at the end of the first list run."""
    blocks = list(stacks[0])
    first = blocks.index(False) if False in blocks else 0
    return first, blocks[::-1].index(False) if False in blocks else 0


IMPORTER = Importer(
    kind="cache-dit",
    title="Read a configuration of cache-dit with a static mask of steps.",
    file="YAML or JSON as cache-dit loads it, with steps_computation_mask and the policy static",
    read=_read,
    example="cache.yaml --model ./flux --steps 28 -o schedule.json",
    cache="residual",
    write=config_of,
)

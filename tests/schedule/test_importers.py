"""Each kind of file against its authors' rules, written here as the loop that decides at each step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_denoisers import wan_transformer

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.sublayers import sublayers
from dipgo_deploy.models.target import schedule_target
from dipgo_deploy.schedule.builders import Target
from dipgo_deploy.schedule.document import BlockEntry, ModelIdentity, SamplerEntry, Schedule
from dipgo_deploy.schedule.forecast import FittedForecast, RuleForecast
from dipgo_deploy.schedule.importers.cache_dit import policy_mask
from dipgo_deploy.schedule.importers.deepcache import grid
from dipgo_deploy.schedule.importers.refused import REFUSED
from dipgo_deploy.schedule.importers.registry import KINDS, WRITTEN, import_schedule, importer

PIXART = tuple(spec.name for spec in sublayers("transformer_blocks", 2, ("attn1", "attn2", "ff")))
FLUX = (
    *(spec.name for spec in sublayers("transformer_blocks", 2, ("attn", "ff", "ff_context"))),
    *(spec.name for spec in sublayers("single_transformer_blocks", 2, ("proj_mlp", "attn", "proj_out"))),
)
BLOCKS = tuple(f"transformer_blocks.{index}" for index in range(4))
STACKS = (*BLOCKS, *(f"single_transformer_blocks.{index}" for index in range(3)))
UNET = (*(f"down_blocks.{i}" for i in range(3)), "mid_block", *(f"up_blocks.{i}" for i in range(3)))
LAYERED_UNET = (
    *(f"down_blocks.{i}.attentions.{j}" for i in range(2) for j in range(2)),
    "mid_block",
    *(f"up_blocks.{i}.attentions.{j}" for i in range(2) for j in range(3)),
)
RATIOS = [1.0, 1.211, 1.117, 1.078, 1.062, 1.039, 1.031, 1.039, 1.023, 1.031, 1.023, 0.98, 1.016, 1.008]


def target(
    names: tuple[str, ...],
    steps: int,
    *,
    cache: str = "output",
    model: str = "PixArtTransformer2DModel",
    sampler: str = "DDIMScheduler",
) -> Target:
    return Target(
        model=ModelIdentity(
            class_name=model, config_hash="d" * 64, granularity="layer" if "." in names[0] else "block"
        ),
        blocks=tuple(BlockEntry(name=name, cache=cache) for name in names),
        sampler=SamplerEntry(class_name=sampler, config={"num_train_timesteps": 1000}, num_inference_steps=steps),
        steps=steps,
        timesteps=tuple(1000 - 1000 * step / steps for step in range(steps)),
    )


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Schedule]:
    """Import a document (JSON, text or bytes) as one kind."""

    def make(kind: str, content: Any, made_for: Target, **settings: Any) -> Schedule:
        path = tmp_path / "given"
        if not isinstance(content, (str, bytes)):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return import_schedule(kind, path, made_for, **settings)

    return make


def refused(read: Callable[..., Schedule], kind: str, content: Any, made_for: Target, words: str) -> None:
    with pytest.raises(UserError) as caught:
        read(kind, content, made_for)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def steps_that_run(schedule: Schedule) -> list[int]:
    assert all(len(set(row)) == 1 for row in schedule.gates)
    return [step for step, row in enumerate(schedule.gates) if row[0]]


def test_every_kind_says_what_it_is() -> None:
    for kind in KINDS:
        found = importer(kind)
        assert found.kind == kind
        assert found.title.endswith(".")
        assert " -o " in found.example
        assert (found.write is not None) == (kind in WRITTEN)
    for name in REFUSED:
        with pytest.raises(UserError, match="so what runs is not known before a run; give "):
            importer(name)
    with pytest.raises(UserError, match="no kind of file"):
        importer("unknown")


# --- masks


def test_numpy_masks(read: Callable[..., Schedule]) -> None:
    mask = np.random.default_rng(0).integers(0, 2, (5, 4))
    mask[0] = 1
    made_for = target(BLOCKS, 5)
    for array in (mask, mask.astype(bool), mask.astype(np.float32), mask[:, ::-1]):
        stream = BytesIO()
        np.save(stream, array)
        assert np.array_equal(read("npy", stream.getvalue(), made_for).gates, array.astype(bool))
        assert np.array_equal(Schedule.from_mask(made_for, array).gates, array.astype(bool))
    assert Schedule.from_mask(made_for, torch.tensor([1, 0, 1, 0, 1])).keep == ("1111", "0000") * 2 + ("1111",)
    assert Schedule.from_mask(made_for, mask.tolist()).provenance["method"] == "mask"
    for wrong, words in (
        (mask[:, :3], "of shape (5, 3)"),
        (mask + 1, "other values than 0 and 1"),
        (mask[:4], "steps: 4 rows"),
        (mask[::-1] * 0, "its cache is read before it was ever written"),
        (np.array([["1"] * 4] * 5), "other values than 0 and 1"),
    ):
        with pytest.raises(UserError, match=words.replace("(", "\\(").replace(")", "\\)")):
            Schedule.from_mask(made_for, wrong)
    stream = BytesIO()
    np.save(stream, np.array([{}], dtype=object), allow_pickle=True)
    refused(read, "npy", stream.getvalue(), made_for, "an array of object, not of numbers")
    stream = BytesIO()
    np.save(stream, mask)
    refused(read, "npy", stream.getvalue()[:-1], made_for, "cut off")
    refused(read, "npy", b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'fortran_order': False", made_for, "numpy.save")
    huge = (
        b"\x93NUMPY\x01\x00\x46\x00" + b"{'descr': '<i8', 'fortran_order': False, 'shape': (5, 4), }".ljust(69) + b"\n"
    )
    refused(read, "npy", huge, made_for, "cut off")


def ecad(gates: np.ndarray, names: Sequence[str], **more: Any) -> dict[str, Any]:
    """A file as ``CacheSchedule.to_json`` writes it."""
    steps: dict[str, Any] = {}
    for step, row in enumerate(gates):
        blocks: dict[str, Any] = steps.setdefault(f"{step:03}", {})
        for name, cell in zip(names, row, strict=True):
            stack, number, part = name.split(".")
            single = stack == "single_transformer_blocks"
            prefix = "single_" if single else "full_" if names is FLUX else ""
            blocks.setdefault(("single_" if single else "") + number, {})[prefix + part] = bool(cell)
    return {"cache_schedule": {"num_blocks": 2, "schedule": steps, **more}, "config": {}, "metrics": {}}


@pytest.mark.parametrize("names", [PIXART, FLUX], ids=["pixart", "flux"])
def test_ecad_computes_what_was_never_computed(read: Callable[..., Schedule], names: tuple[str, ...]) -> None:
    gates = np.random.default_rng(1).integers(0, 2, (6, len(names))).astype(bool)
    schedule = read("ecad", ecad(gates, names), target(names, 6))
    cached = [False] * len(names)
    for row, made in zip(gates, schedule.gates, strict=True):
        expected = [bool(recompute or not known) for recompute, known in zip(row, cached, strict=True)]
        assert list(made) == expected
        cached = [True] * len(names)
    assert not all(gates[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda document: document.pop("cache_schedule"), "not a file of ECAD"),
        (lambda document: document["cache_schedule"]["schedule"].pop("001"), "step 1 is missing"),
        (
            lambda document: document["cache_schedule"]["schedule"]["002"].pop("1"),
            "step 2: blocks: transformer_blocks.1",
        ),
        (
            lambda document: document["cache_schedule"]["schedule"]["001"]["0"].update(attn1=1),
            "step 1, block 0, attn1: 1 is not true or false",
        ),
        (
            lambda document: document["cache_schedule"]["schedule"]["001"]["0"].update(
                custom_compute_attn={"name": "x"}
            ),
            "custom_compute_attn is code of theirs",
        ),
        (
            lambda document: document["cache_schedule"]["schedule"]["001"]["0"].update(x=True),
            "is no block of this model",
        ),
        (lambda document: document["cache_schedule"]["schedule"].update(a={}), "step 'a': is no number"),
    ],
)
def test_wrong_ecad_files(read: Callable[..., Schedule], change: Callable[[Any], Any], words: str) -> None:
    document = ecad(np.ones((3, len(PIXART)), dtype=bool), PIXART)
    change(document)
    refused(read, "ecad", document, target(PIXART, 3), words)


# --- steps that run whole


@pytest.mark.parametrize(("steps", "interval"), [(50, 3), (20, 2), (7, 5), (5, 1)])
def test_fora_counts_downwards(read: Callable[..., Schedule], steps: int, interval: int) -> None:
    schedule = read("fora", {"cache-threshold": str(interval)}, target(PIXART, steps))
    expected = []
    for evaluation, index in enumerate(list(range(steps))[::-1]):
        if index == steps - 1 or index % interval == 0:
            expected.append(evaluation)
    assert steps_that_run(schedule) == expected


@pytest.mark.parametrize(
    "content", [{"cache_step": [1, 3]}, {"compute_step": [0, 2, 4]}, [0, 2, 4], [1, 0, 1, 0, 1], {"mask": "1,0,1,0,1"}]
)
def test_step_lists(read: Callable[..., Schedule], content: Any) -> None:
    assert steps_that_run(read("step-list", content, target(BLOCKS, 5, cache="residual"))) == [0, 2, 4]


def test_budcache_checkpoints_are_data(read: Callable[..., Schedule]) -> None:
    stream = BytesIO()
    torch.save({"cache_step": [1, 2, 4], "nfe": 3, "best_loss": 0.25}, stream)
    schedule = read("step-list", stream.getvalue(), target(BLOCKS, 6, cache="residual"))
    assert steps_that_run(schedule) == [0, 3, 5]
    refused(read, "step-list", [0, 9], target(BLOCKS, 5, cache="residual"), "step 9 is none of the 5 evaluations")
    refused(read, "step-list", [0, 2], target(BLOCKS, 5), "give --cache residual")
    refused(read, "step-list", [2], target(BLOCKS, 5, cache="residual"), "its cache is read before")


@pytest.mark.parametrize(("threshold", "most", "retained"), [(0.06, 3, 0.2), (0.12, 5, 0.1), (0.24, 2, 0.0)])
def test_magcache_decides_by_its_ratios(
    read: Callable[..., Schedule], threshold: float, most: int, retained: float
) -> None:
    steps = len(RATIOS)
    given = {"mag_ratios": RATIOS, "threshold": threshold, "max_skip_steps": most, "retention_ratio": retained}
    accumulated_ratio, accumulated_error, accumulated_steps, residual, expected = 1.0, 0.0, 0, None, []
    for step in range(steps):
        compute = True
        if step >= int(retained * steps + 0.5):
            accumulated_ratio *= RATIOS[step]
            accumulated_steps += 1
            accumulated_error += abs(1 - accumulated_ratio)
            if residual is not None and accumulated_error <= threshold and accumulated_steps <= most:
                compute = False
            else:
                accumulated_ratio, accumulated_error, accumulated_steps = 1.0, 0.0, 0
        if compute:
            residual = step
            expected.append(step)
    schedule = read("magcache", given, target(BLOCKS, steps, cache="residual"))
    assert steps_that_run(schedule) == expected
    assert len(expected) < steps
    # Another number of steps takes the nearest ratios; a step can be told to run.
    longer = read("magcache", {**given, "always": [9]}, target(BLOCKS, 28, cache="residual"))
    assert 9 in steps_that_run(longer)


def test_magcache_takes_diffusers_own_ratios(read: Callable[..., Schedule]) -> None:
    from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

    for threshold, count in ((0.06, 14), (0.12, 12)):
        given = {"mag_ratios": FLUX_MAG_RATIOS.tolist(), "threshold": threshold}
        assert len(steps_that_run(read("magcache", given, target(BLOCKS, 28, cache="residual")))) == count


def test_magcache_of_both_halves(read: Callable[..., Schedule]) -> None:
    both = [ratio for ratio in RATIOS for _ in range(2)]
    given = {"mag_ratios": both, "magcache_thresh": 0.12, "magcache_K": 3, "retention_ratio": 0.15}
    steps = len(RATIOS)
    # The authors' loop for Wan: twice a step, sums for each half.
    ratio, error, skipped, expected = [1.0, 1.0], [0.0, 0.0], [0, 0], []
    for count in range(2 * steps):
        half, skip = count % 2, False
        if count >= int(2 * steps * 0.15):
            ratio[half] *= both[count]
            skipped[half] += 1
            error[half] += abs(1 - ratio[half])
            skip = error[half] < 0.12 and skipped[half] <= 3
            if not skip:
                ratio[half], error[half], skipped[half] = 1.0, 0.0, 0
        if not skip and half == 0:
            expected.append(count // 2)
    assert steps_that_run(read("magcache", given, target(BLOCKS, steps, cache="residual"))) == expected
    both[13] = 3.0
    refused(read, "magcache", given, target(BLOCKS, steps, cache="residual"), "step 6 runs for one half")


@pytest.mark.parametrize(("retained", "threshold"), [(False, 2.0), (True, 0.6)])
def test_teacache_for_wan_looks_at_the_timestep_alone(
    read: Callable[..., Schedule], tmp_path: Path, retained: bool, threshold: float
) -> None:
    steps, coefficients = 14, [0.5, 0.6, 0.0]
    model = wan_transformer()
    model.save_pretrained(tmp_path / "wan")
    made_for = schedule_target(str(tmp_path / "wan"), "flow-euler", steps)
    # The authors' loop, with what the model itself embeds.
    expected, accumulated, previous = [], 0.0, None
    with torch.no_grad():
        for step, timestep in enumerate(made_for.timesteps):
            e, e0, *_ = model.condition_embedder(torch.tensor([timestep]), torch.zeros(1, 2, 24))
            modulated = e0 if retained else e
            if step < (5 if retained else 1) or step >= steps - (0 if retained else 1):
                compute, accumulated = True, 0.0
            else:
                change = ((modulated - previous).abs().mean() / previous.abs().mean()).item()
                accumulated += np.poly1d(coefficients)(change)
                compute = not accumulated < threshold
                accumulated = 0.0 if compute else accumulated
            previous = modulated
            expected += [step] if compute else []
    given = {"teacache_thresh": threshold, "use_ret_steps": retained, "coefficients": coefficients}
    assert steps_that_run(read("teacache-wan", given, made_for)) == expected
    assert len(expected) < steps - 3
    refused(read, "teacache-wan", {"teacache_thresh": 0.1}, made_for, "coefficients: none are known for 2 blocks")
    refused(read, "teacache-wan", given, target(BLOCKS, 14, cache="residual"), "give a Wan model")


# --- cache-dit


@pytest.mark.parametrize(
    ("policy", "steps", "mask"),
    [
        ("slow", 28, "1111111101110011100110010001"),
        ("medium", 28, "1111110110001100011000110001"),
        ("fast", 28, "1111110100010000100000100001"),
        ("ultra", 28, "1111001000001000000100000001"),
        ("fast", 20, "11111101000000000001"),
        ("medium", 9, "111110101"),
        ("fast", 8, "11101001"),
        ("ultra", 4, "1101"),
        ("slow", 6, "111001"),
    ],
)
def test_policies_of_cache_dit(policy: str, steps: int, mask: str) -> None:
    made = "".join("01"[run] for run in policy_mask(policy, steps))
    assert made == mask
    assert len(made) == steps


@pytest.mark.parametrize("policy", ["slow", "medium", "fast", "ultra"])
def test_policies_reach_any_number_of_steps(policy: str) -> None:
    for steps in range(8, 101):
        mask = policy_mask(policy, steps)
        assert len(mask) == steps
        assert mask[0] and mask[-1] and not all(mask)
    with pytest.raises(UserError, match="is no policy of cache-dit for 5 steps"):
        policy_mask(policy, 5)


CONFIG = {
    "cache_type": "DBCache",
    "Fn_compute_blocks": 1,
    "Bn_compute_blocks": 0,
    "steps_computation_mask": [1, 1, 0, 1, 0, 1],
    "steps_computation_policy": "static",
    "residual_diff_threshold": 0.12,
}


def test_cache_dit_keeps_the_outer_blocks_of_each_list(read: Callable[..., Schedule]) -> None:
    made_for = target(STACKS, 6, cache="residual", model="FluxTransformer2DModel")
    for content in ({"cache_config": CONFIG}, CONFIG):
        assert read("cache-dit", content, made_for).keep == ("1" * 7,) * 2 + ("1000100", "1" * 7) * 2
    yaml = "cache_config:\n  " + "\n  ".join(f"{name}: {json.dumps(value)}" for name, value in CONFIG.items())
    schedule = read("cache-dit", yaml, made_for)
    assert schedule.keep[2] == "1000100"
    both = {**CONFIG, "Bn_compute_blocks": 2, "steps_computation_mask": "110101"}
    assert read("cache-dit", both, made_for).keep[2:5] == ("1011111", "1" * 7, "1011111")
    # And back: the file that is written reads as the same gates.
    written = importer("cache-dit").write
    assert written is not None
    assert read("cache-dit", written(schedule), made_for).keep == schedule.keep
    with pytest.raises(UserError, match="are not the first and the last ones of each list"):
        written(schedule.with_gates([[True] * 7, [True, False, False, True, True, True, True], *[[True] * 7] * 4]))


def test_cache_dit_with_taylorseer(read: Callable[..., Schedule]) -> None:
    given = {**CONFIG, "enable_taylorseer": True, "taylorseer_order": 1}
    schedule = read("cache-dit", given, target(STACKS, 6, cache="residual"))
    assert isinstance(schedule.forecast, FittedForecast)
    # Step 1 makes no difference, step 3 one over two steps; what is computed at each step has none.
    assert schedule.forecast.weights[2][1] == ()
    assert schedule.forecast.weights[4][1] == pytest.approx((1.5, -0.5))
    assert schedule.forecast.weights[4][0] == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps_computation_policy": "dynamic"}, "a threshold on data decides; give a steps_computation_mask"),
        ({"steps_computation_mask": None}, "steps_computation_mask: is missing"),
        ({"cache_type": "DBPrune"}, "decides on data which blocks run"),
        ({"Fn_compute_blocks": 8}, "8 and 0 blocks of the 4 in transformer_blocks are more than there are"),
        ({"steps_computation_mask": [1, 0]}, "2 entries, but the sampler evaluates 6 times"),
        ({"enable_dmd": True}, "enable_dmd: is true, which fits exponentials to the sample's own past"),
        ({"enable_foca": True, "enable_taylorseer": True}, "enable_foca: is true, and so is enable_taylorseer"),
        ({"enable_foca": True, "calibrator_cache_type": "hidden_states"}, "calibrator_cache_type: is hidden_states"),
        ({"surprise": 1}, "surprise: is no setting of cache-dit's DBCache that is known"),
        ({"num_inference_steps": 28}, "num_inference_steps: made for 28 steps, not for 6; give --steps 28"),
    ],
)
def test_what_cache_dit_decides_on_data_is_refused(
    read: Callable[..., Schedule], change: dict[str, Any], words: str
) -> None:
    refused(read, "cache-dit", {**CONFIG, **change}, target(STACKS, 6, cache="residual"), words)


def test_yaml_makes_nothing_but_data(read: Callable[..., Schedule]) -> None:
    made_for = target(STACKS, 6, cache="residual")
    for text in ("a: &x [1]\nb: *x", "a: !!python/object/apply:os.system ['true']", "a: !x 1"):
        refused(read, "cache-dit", text, made_for, "has references or tags")
    refused(read, "cache-dit", "a: [", made_for, "neither JSON")


# --- parts of a model


def test_deepcache_with_its_uneven_grid(read: Callable[..., Schedule]) -> None:
    # The grid that stands as a comment in the authors' pipeline, for 50 steps and an interval of 5.
    assert len(grid(50, 10, 15, 1.4)) == 10
    given = {"cache_interval": 5, "cache_layer_id": 1, "cache_block_id": 0, "uniform": False, "pow": 1.4, "center": 15}
    schedule = read("deepcache", given, target(LAYERED_UNET, 50))
    full = [step for step, row in enumerate(schedule.gates) if all(row)]
    assert full == sorted(grid(50, 10, 15, 1.4))
    even = read("deepcache", {"cache_interval": 5, "cache_branch_id": 3}, target(LAYERED_UNET, 50))
    assert [step for step, row in enumerate(even.gates) if all(row)] == list(range(0, 50, 5))
    assert even.gates[1] == schedule.gates[1]
    impossible = {**given, "pow": 1.0}
    refused(read, "deepcache", impossible, target(LAYERED_UNET, 50), "pow: no grid of 10 of 50 steps")


NVIDIA = """
import os
import re

SDXL = [
    {
        "wildcard_or_filter_func": lambda name: "up_blocks.2" not in name,
        "select_cache_step_func": lambda step: (step % 2) != 0,
    }
]
SD3 = [
    {
        "wildcard_or_filter_func": lambda name: re.search(
            r"^((?!transformer_blocks\\.(1[6-9]|2[0-3])).)*$", name
        ),
        "select_cache_step_func": lambda step: (step % 2) != 0,
    }
]
SEVERAL = [
    {"wildcard_or_filter_func": "*_blocks.*", "select_cache_step_func": lambda step: step in range(1, 4)},
    {"wildcard_or_filter_func": lambda n: n.startswith("mid"), "select_cache_step_func": lambda s: s > 2 and s != 4},
    {"wildcard_or_filter_func": "up_blocks.0", "select_cache_step_func": lambda s: s in [5]},
]
BAD = [{"wildcard_or_filter_func": lambda n: os.system("true"), "select_cache_step_func": lambda s: True}]
"""


ENDLESS = 'x = [{"wildcard_or_filter_func": lambda n: re.search("%s", n), "select_cache_step_func": lambda s: s > 0}]'


def test_cache_diffusion_is_read_without_being_run(read: Callable[..., Schedule]) -> None:
    made_for = target(UNET, 6)
    schedule = read("cache-diffusion", NVIDIA, made_for, name="SDXL")
    expected = [["up_blocks.2" in name or step % 2 == 0 for name in UNET] for step in range(6)]
    assert [list(row) for row in schedule.gates] == expected
    several = read("cache-diffusion", NVIDIA, made_for, name="SEVERAL")

    def computed(name: str, step: int) -> bool:
        if name == "up_blocks.0":
            return step != 5
        return not (step > 2 and step != 4) if name == "mid_block" else not 1 <= step < 4

    assert [list(row) for row in several.gates] == [[computed(name, step) for name in UNET] for step in range(6)]
    names = tuple(f"transformer_blocks.{index}" for index in range(24))
    joint = read("cache-diffusion", NVIDIA, target(names, 2), name="SD3")
    assert joint.keep[1] == "0" * 16 + "1" * 8
    for content, words in (
        (NVIDIA, "has several lists (SDXL, SD3, SEVERAL, BAD)"),
        ("x = [{", "is no Python, or nested too deep"),
        ("x = [1]", "line 1: is no entry with"),
        ('x = [{"wildcard_or_filter_func": "*", "select_cache_step_func": lambda s: s ** 9}]', "is not understood"),
        ('x = [{"wildcard_or_filter_func": "*", "select_cache_step_func": lambda s: s % 0}]', "divides by zero"),
        (ENDLESS % "(.|.|.)*!", "repeats more than one character, which may not end"),
        (ENDLESS % "(?:.*)*!", "repeats more than one character"),
        (ENDLESS % ".*.*.*.*!", "repeats more than one character"),
        (ENDLESS % "(", "is no pattern (missing ), unterminated subpattern"),
    ):
        refused(read, "cache-diffusion", content, made_for, words)
    with pytest.raises(UserError, match="os.system.* is not understood, and nothing in a file is run"):
        read("cache-diffusion", NVIDIA, made_for, name="BAD")


def test_pab_skips_within_its_timesteps(read: Callable[..., Schedule]) -> None:
    given = {
        "spatial_attention_block_skip_range": 2,
        "cross_attention_block_skip_range": 3,
        "cross_attention_timestep_skip_range": [100, 900],
    }
    made_for = target(PIXART, 10)
    schedule = read("pab", given, made_for)
    for column, name in enumerate(PIXART):
        cache = None
        for step, timestep in enumerate(made_for.timesteps):
            skip, low, high = {"attn1": (2, 100, 800), "attn2": (3, 100, 900)}.get(name.split(".")[2], (1, 0, 0))
            compute = cache is None or not low < timestep < high or step % skip == 0
            cache = step if compute else cache
            assert schedule.gates[step][column] == compute, (name, step)
    assert not all(map(all, schedule.gates))
    refused(read, "pab", {"cross_attention_block_skip_range": 3}, target(BLOCKS, 4), "no layer of this model")


def test_tgate_stops_attention_to_the_text(read: Callable[..., Schedule]) -> None:
    gate_step, sp_interval, fi_interval, warm_up = 10, 5, 2, 2
    given = {"gate_step": gate_step, "sp_interval": sp_interval, "fi_interval": fi_interval, "warm_up": warm_up}
    schedule = read("tgate", given, target(PIXART, 15))
    for step, row in enumerate(schedule.gates):
        if step < gate_step - 1:
            cross, own = True, step <= warm_up or step % sp_interval == 0
        elif step == gate_step - 1:
            cross, own = True, True
        else:
            cross, own = False, step % fi_interval == 0
        assert list(row) == [own, cross, True] * 2
    refused(read, "tgate", given, target(FLUX, 15), "attention to the text")


def test_delta_dit_leaves_out_last_blocks_and_then_first_ones(read: Callable[..., Schedule]) -> None:
    schedule = read("delta-dit", {"interval": 2, "blocks": 3, "gate_step": 3}, target(BLOCKS, 6, cache="residual"))
    assert schedule.keep == ("1111", "1000", "1111", "0001", "1111", "0001")


# --- forecasts


def factors_of(steps: int, interval: int, order: int, first: int) -> list[dict[int, np.ndarray] | None]:
    """What TaylorSeer's FLUX code holds at each step (None: it computes), each value a unit vector of its step."""
    units, cache, activated, counter, seen = np.eye(steps), {}, [0], 0, []
    for step in range(steps):
        if step < first or counter == interval - 1:
            counter = 0
            activated.append(step)
            distance = activated[-1] - activated[-2]
            updated = {0: units[step]}
            for place in range(order):
                if cache.get(place) is None or not step > first - 2:
                    break
                updated[place + 1] = (updated[place] - cache[place]) / distance
            cache = updated
            seen.append(None)
        else:
            counter += 1
            seen.append((step - activated[-1], dict(cache)))
    return seen


@pytest.mark.parametrize(("order", "first"), [(1, 3), (2, 3), (2, 2), (1, 1), (0, 3), (4, 3), (3, 1)])
@pytest.mark.parametrize("mode", ["Taylor", "HiCache"])
def test_taylorseer_and_hicache(read: Callable[..., Schedule], order: int, first: int, mode: str) -> None:
    steps, interval, scale = 14, 4, 0.6
    given = {"interval": interval, "max_order": order, "first_enhance": first, "mode": mode, "hicache_scale": scale}
    if mode == "Taylor":
        del given["hicache_scale"]
    schedule = read("taylorseer", given, target(FLUX, steps, model="FluxTransformer2DModel"))
    stored: list[int] = []
    for step, held in enumerate(factors_of(steps, interval, order, first)):
        assert set(schedule.gates[step]) == {held is None}
        if held is None:
            stored.insert(0, step)
            continue
        distance, factors = held
        expected = np.zeros(steps)
        for place, factor in factors.items():
            hermite = np.polynomial.hermite.hermval(scale * distance, [0] * place + [1])
            expected += (
                factor * (distance**place if mode == "Taylor" else scale**place * hermite) / math.factorial(place)
            )
        weights = schedule.forecast.weights_of(step, 0, stored) if schedule.forecast else ()
        made = np.zeros(steps)
        for other, weight in zip(stored, weights or (1.0,), strict=False):
            made[other] = weight
        np.testing.assert_allclose(made, expected, atol=1e-12)


def test_a_rule_is_kept_as_one_where_it_gives_the_same(read: Callable[..., Schedule]) -> None:
    made_for = target(FLUX, 14, model="FluxTransformer2DModel")
    line = read("taylorseer", {"interval": 4, "max_order": 1, "first_enhance": 3}, made_for)
    assert line.forecast == RuleForecast(kind="taylor", order=1)
    # The authors make the second difference one computed step later than there are three values.
    curve = read("taylorseer", {"interval": 4, "max_order": 2, "first_enhance": 3}, made_for)
    assert isinstance(curve.forecast, FittedForecast)


def test_what_needs_more_values_than_are_kept_is_refused(read: Callable[..., Schedule]) -> None:
    made_for = target(FLUX, 12)
    refused(read, "taylorseer", {"interval": 3, "max_order": 32}, made_for, "max_order: 32 is")
    refused(read, "taylorseer", {"interval": 3, "max_order": 1, "mode": "ToCa"}, made_for, "is not Taylor or HiCache")


def test_learned_weights_of_blocks(read: Callable[..., Schedule]) -> None:
    given = {"compute_step": [0, 1, 4], "weights": {"2": [1.5, -0.5], "3": [2.0, -1.0]}}
    schedule = read("weights", given, target(BLOCKS, 5, cache="residual"))
    assert steps_that_run(schedule) == [0, 1, 4]
    assert schedule.forecast.weights[2] == ((1.5, -0.5),) * 4
    made_for = target(BLOCKS, 5, cache="residual")
    refused(read, "weights", {**given, "weights": {"2": [1.0]}}, made_for, "3: is missing")
    refused(read, "weights", {**given, "weights": {"2": [1, 2, 3], "3": [1]}}, made_for, "step 2 has 3, and 2 values")
    refused(read, "weights", {**given, "of": "noise"}, made_for, "is not blocks or prediction")


# --- back


def test_smoothcache_files_are_written_back(read: Callable[..., Schedule]) -> None:
    names = tuple(spec.name for spec in sublayers("transformer_blocks", 3, ("attn1", "ff")))
    gates = np.random.default_rng(5).integers(0, 2, (6, 6)).astype(bool)
    gates[0] = True
    schedule = Schedule.from_mask(target(names, 6), gates)
    written = importer("smoothcache").write
    assert written is not None
    assert read("smoothcache", written(schedule), target(names, 6)).keep == schedule.keep
    with pytest.raises(UserError, match="no layer inside a transformer block"):
        written(Schedule.from_mask(target(BLOCKS, 2), np.ones((2, 4))))

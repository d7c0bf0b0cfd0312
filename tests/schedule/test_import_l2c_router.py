from __future__ import annotations

import argparse
import io
import os
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.sublayers import sublayers
from dipgo_deploy.schedule.builders import Target
from dipgo_deploy.schedule.importers.l2c_router import read_routers
from dipgo_deploy.schedule.importers.registry import import_schedule

PUBLISHED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "published-schedules"
DEPTH = 3
KINDS_OF = ("l2c-router", "smoothcache")
NAMES = tuple(spec.name for spec in sublayers("transformer_blocks", DEPTH, ("attn1", "ff")))
MakeTarget = Callable[..., Target]


def read_gates(data: bytes, names: tuple[str, ...], threshold: float = 0.1) -> Any:
    gates, rule = read_routers(data, names, threshold)
    assert rule == "l2c"
    return gates


class Routers(torch.nn.Module):
    """As the authors' training code: one vector of scores a step, named ``{step}.prob``."""

    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__()
        for step, row in enumerate(scores):
            router = torch.nn.Module()
            router.prob = torch.nn.Parameter(row.clone())
            self.add_module(str(step), router)


def checkpoint(scores: torch.Tensor, **changes: Any) -> bytes:
    """A checkpoint as the authors' training script saves it, optimiser and command line included."""
    routers = Routers(scores)
    optimiser = torch.optim.AdamW(routers.parameters(), lr=1e-3, weight_decay=0)
    sum(parameter.sum() for parameter in [*routers.parameters()][::2]).backward()  # the others are not trained
    optimiser.step()
    with torch.no_grad():
        for row, parameter in zip(scores, routers.parameters(), strict=True):
            parameter.copy_(row)
    document = {
        "routers": routers.state_dict(),
        "opt": optimiser.state_dict(),
        "args": argparse.Namespace(model="DiT-XL/2", num_sampling_steps=len(scores), ste_threshold=None),
    }
    return saved({**document, **changes})


def saved(document: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(document, stream)
    return stream.getvalue()


def as_the_authors_sample(scores: torch.Tensor, threshold: float) -> list[list[bool]]:
    """Which layers each evaluation computes, by the rules of the authors' sampling code, written for one number each.

    Their loop counts ``cur_timestep`` down from an odd number, clears what is reused when it is odd, and looks the
    router up by the rank of the timestep, which falls from T - 1.
    """
    steps, layers = scores.shape
    rank = [set(torch.nonzero(torch.sigmoid(row) > threshold).flatten().tolist()) for row in scores]
    stored: set[int] = set()
    current, rows = 19, []
    for evaluation in range(steps):
        if current % 2 == 1:
            stored = set()
        rows.append([layer not in stored or layer in rank[steps - 1 - evaluation] for layer in range(layers)])
        stored = set(range(layers))
        current -= 1
    return rows


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_gates_are_what_the_authors_loop_computes(threshold: float, seed: int) -> None:
    scores = torch.randn(8, 2 * DEPTH, generator=torch.Generator().manual_seed(seed)) * 3
    gates = read_gates(checkpoint(scores), NAMES, threshold)
    assert [list(row) for row in gates] == as_the_authors_sample(scores, threshold)
    assert not all(map(all, gates))


def test_column_2i_is_the_attention_and_the_last_router_the_first_evaluation() -> None:
    scores = torch.full((4, 2 * DEPTH), -5.0)
    scores[2, 2] = 5  # second evaluation: attention of block 1
    scores[0, 5] = 5  # fourth evaluation: feed-forward of block 2
    rows = ["".join("01"[kept] for kept in row) for row in read_gates(checkpoint(scores), NAMES)]
    assert rows == ["111111", "001000", "111111", "000001"]


def test_routers_for_u_vit_are_refused_by_name() -> None:
    """Their files hold the routers alone."""
    document = Routers(torch.zeros(4, 2 * DEPTH)).state_dict()
    with pytest.raises(UserError, match="is a router of Learning-to-Cache for U-ViT: diffusers has no such model"):
        read_gates(saved(document), NAMES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_views_and_other_dtypes_are_read(dtype: torch.dtype) -> None:
    base = torch.linspace(-4, 4, 4 * 2 * DEPTH * 2).to(dtype)
    rows = base.reshape(4, -1)[:, ::2]  # four views into one storage, with a stride
    document = {"routers": OrderedDict((f"{index}.prob", row) for index, row in enumerate(rows))}
    gates = read_gates(saved(document), NAMES, 0.5)
    assert [list(row) for row in gates] == as_the_authors_sample(rows.double(), 0.5)


def test_a_file_makes_a_schedule(tmp_path: Path, dit_target: MakeTarget) -> None:
    path = tmp_path / "router.pt"
    path.write_bytes(checkpoint(torch.full((4, 2 * DEPTH), -3.0)))
    schedule = import_schedule("l2c-router", path, dit_target(DEPTH, 4))
    assert schedule.keep == ("111111", "000000") * 2
    assert schedule.provenance["method"] == "import l2c-router"
    assert schedule.provenance["parameters"]["threshold"] == 0.1
    assert schedule.provenance["parameters"]["rule"] == "l2c"
    # sigmoid(-3) = 0.047
    assert import_schedule("l2c-router", path, dit_target(DEPTH, 4), threshold=0.04).keep == ("111111",) * 4
    for threshold in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="threshold: .* is not between 0 and 1"):
            import_schedule("l2c-router", path, dit_target(DEPTH, 4), threshold=threshold)
    with pytest.raises(UserError, match=r"router.pt: steps: 4 rows"):
        import_schedule("l2c-router", path, dit_target(DEPTH, 6))


def test_the_released_router_is_the_released_json(dit_target: MakeTarget) -> None:
    paths = [PUBLISHED / name for name in ("l2c-dit-DDIM50_router.pt", "smoothcache-50-N-2-l2c.json")]
    for path in paths:
        if not path.is_file():
            pytest.skip(f"{path.name} is not beside this repository")
    target = dit_target(28, 50)
    router, cells = (import_schedule(kind, path, target) for kind, path in zip(KINDS_OF, paths, strict=True))
    assert router.gates == cells.gates


# --- HarmoniCa ---


def harmonica(scores: torch.Tensor) -> dict[str, Any]:
    """A checkpoint as HarmoniCa's training code saves it: the last router fixed at 5, all others trained."""
    routers = Routers(torch.cat([scores[:-1], torch.full((1, scores.shape[1]), 5.0)]))
    list(routers.parameters())[-1].requires_grad_(False)
    optimiser = torch.optim.AdamW(routers.parameters(), lr=0.0, weight_decay=0)
    sum(parameter.sum() for parameter in routers.parameters()).backward()
    optimiser.step()
    return {"routers": routers.state_dict(), "opt": optimiser.state_dict(), "args": argparse.Namespace(lambda_c=500)}


def as_harmonica_samples(scores: torch.Tensor, threshold: float) -> list[list[bool]]:
    """Which layers each evaluation computes: what is stored is never cleared, every router counts."""
    steps, layers = scores.shape
    stored: set[int] = set()
    rows = []
    for index in reversed(range(steps)):
        above = set(torch.nonzero(torch.sigmoid(scores[index]) > threshold).flatten().tolist())
        rows.append([layer not in stored or layer in above for layer in range(layers)])
        stored = set(range(layers))
    return rows


@pytest.mark.parametrize("steps", [7, 10])
@pytest.mark.parametrize("with_optimiser", [True, False])
def test_every_router_of_harmonica_counts(steps: int, with_optimiser: bool) -> None:
    scores = torch.randn(steps, 2 * DEPTH, generator=torch.Generator().manual_seed(steps)) * 3
    document = harmonica(scores)
    if not with_optimiser:
        del document["opt"]
    gates, rule = read_routers(saved(document), NAMES)
    assert rule == "harmonica"
    assert [list(row) for row in gates] == as_harmonica_samples(scores, 0.1)
    assert any(not all(row) for row in gates[::2])  # where Learning-to-Cache computes everything


def test_whose_routers_they_are_can_be_said_and_has_to_be_where_it_does_not_show(
    tmp_path: Path, dit_target: MakeTarget
) -> None:
    scores = torch.full((4, 2 * DEPTH), -5.0)
    mixed = {**harmonica(scores), "routers": Routers(scores).state_dict()}  # all trained, none fixed
    with pytest.raises(UserError, match="cannot tell .*3 of 4 routers were trained.*--rule l2c or --rule harmonica"):
        read_routers(saved(mixed), NAMES)
    assert read_routers(saved(mixed), NAMES, rule="harmonica")[0][1:] == ((False,) * 6,) * 3
    path = tmp_path / "router.pt"
    path.write_bytes(saved(harmonica(scores)))
    schedule = import_schedule("l2c-router", path, dit_target(DEPTH, 4))
    assert schedule.keep == ("111111", "000000", "000000", "000000")
    assert schedule.provenance["parameters"]["rule"] == "harmonica"
    assert import_schedule("l2c-router", path, dit_target(DEPTH, 4), rule="l2c").keep == ("111111", "000000") * 2


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(UserError, match="router 0: not all scores are finite"):
        read_gates(checkpoint(torch.full((2, 2 * DEPTH), float("nan"))), NAMES)


# --- refusing ---


class Evil:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("place", ["root", "args", "routers", "score"])
def test_malicious_files_are_refused_and_nothing_runs(tmp_path: Path, place: str) -> None:
    marker = tmp_path / "ran"
    evil = Evil(os.system, f"touch {marker}")
    scores = torch.zeros(2, 2 * DEPTH)
    if place == "root":
        data = saved(evil)
    elif place == "score":
        data = checkpoint(scores, routers={"0.prob": evil, "1.prob": scores[1]})
    else:
        data = checkpoint(scores, **{place: evil})
    assert not marker.exists()
    with pytest.raises(UserError, match=r"refers to posix.system, which no schedule needs: refused, nothing was run"):
        read_gates(data, NAMES)
    assert not marker.exists()


def rezipped(data: bytes, change: Callable[[dict[str, bytes]], None], compression: int = zipfile.ZIP_STORED) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    change(entries)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as new:
        for name, content in entries.items():
            new.writestr(name, content)
    return stream.getvalue()


def test_damaged_archives_are_refused() -> None:
    data = checkpoint(torch.zeros(2, 2 * DEPTH))
    assert read_gates(rezipped(data, lambda entries: None), NAMES) == read_gates(data, NAMES)
    root = zipfile.ZipFile(io.BytesIO(data)).namelist()[0].split("/")[0]

    def cut(entries: dict[str, bytes]) -> None:
        entries[f"{root}/data/0"] = entries[f"{root}/data/0"][:-1]

    cases = [
        (data[:100], "no complete zip archive"),
        (b"", "no complete zip archive"),
        (rezipped(data, lambda entries: None, zipfile.ZIP_DEFLATED), "is compressed"),
        (rezipped(data, lambda entries: entries.pop(f"{root}/data.pkl")), "has 0 data.pkl, not one"),  # type: ignore[arg-type]
        (rezipped(data, lambda entries: entries.pop(f"{root}/data/0")), "data/0 in it is missing"),  # type: ignore[arg-type]
        (rezipped(data, lambda entries: entries.update({f"{root}/byteorder": b"big"})), "big-endian"),
        (rezipped(data, cut), "router 0: the tensor reaches beyond its storage"),
    ]
    for damaged, words in cases:
        with pytest.raises(UserError, match=words):
            read_gates(damaged, NAMES)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_changed_byte_gives_gates_or_one_line(data: st.DataObject) -> None:
    content = bytearray(checkpoint(torch.zeros(2, 2 * DEPTH)))
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        read_gates(bytes(content), NAMES)
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ([], "has no 'routers'"),
        ({"model": {}}, "has no 'routers'"),
        ({"routers": {}}, "has no 'routers'"),
        ({"routers": {"1.prob": torch.zeros(6), "2.prob": torch.zeros(6)}}, "routers: 0.prob is missing, there are 2"),
        ({"routers": {"0.prob": torch.zeros(6)}}, "1 routers: evaluations go in pairs"),
        (
            {"routers": {"0.prob": torch.zeros(4), "1.prob": torch.zeros(4)}},
            "router 0: a tensor of 4 elements, not of 6",
        ),
        ({"routers": {"0.prob": torch.zeros(2, 3), "1.prob": 0}}, "router 0: not a tensor of one dimension"),
        ({"routers": {"0.prob": 1.5, "1.prob": 0}}, "router 0: not a tensor of one dimension"),
    ],
)
def test_other_documents_are_refused(document: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        read_gates(saved(document), NAMES)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_models_are_refused() -> None:
    data = checkpoint(torch.zeros(2, 2 * DEPTH))
    with pytest.raises(UserError, match="use a transformer with --granularity layer"):
        read_gates(data, ("transformer_blocks.0", "transformer_blocks.1"))
    with pytest.raises(UserError, match="this model has no layers of kind 'mlp', only attn1"):
        read_gates(data, NAMES[::2])
    with pytest.raises(UserError, match="blocks with only an attention or only a feed-forward"):
        read_gates(data, NAMES[:-1])


def test_other_parts_of_a_block_are_always_computed() -> None:
    names = tuple(spec.name for spec in sublayers("transformer_blocks", DEPTH, ("attn1", "attn2", "ff")))
    gates = read_gates(checkpoint(torch.full((2, 2 * DEPTH), -5.0)), names)
    assert gates == ((True,) * 9, (False, True, False) * DEPTH)

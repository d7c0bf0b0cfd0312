"""Schedules of other tools, imported: released gates (a pickle), router checkpoints, CSV and JSON."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tools.campaign.kinds.schedules import strict_json
from tools.campaign.material import STEPS, Material
from tools.campaign.mutate import Changed, change_bytes, change_json, pick
from tools.campaign.verdict import Ran, Verdict
from tools.campaign.worker import Trial

_UNITS = 4  # the class model's: attention and feed-forward of two blocks
# Opcodes of pickles, put in or over others: marks, huge lengths, memo, calls.
_OPCODES = tuple(
    code.encode("latin-1")
    for code in (
        "(",
        "0",
        "1",
        "2",
        ".",
        "]",
        "}",
        ")",
        "t",
        "l",
        "d",
        "R",
        "\x81",
        "\x93",
        "b",
        "Q",
        "\x94",
        "\x85",
        "h\x00",
    )
)
_OPCODES += (
    b"X\xff\xff\xff\x7f",
    b"B\xff\xff\xff\xff",
    b"\x8b\xff\xff\xff\x7f",
    b"j\xff\xff\xff\xff",
    b"\x8a\xff" + b"\x7f" * 255,
)
_OPCODES += (b"cos\nsystem\n", b"I" + b"9" * 6000 + b"\n", b"\x8d" + b"\xff" * 8, b"\x95" + b"\xff" * 8, b"F1e999\n")


@dataclass(frozen=True)
class Importers:
    """``dipgo-schedule import``."""

    material: Material
    name: str = "importers"

    def trial(self, random: np.random.Generator, folder: Path) -> Trial:
        """One of the four formats, for the class model (the released gates for ``fashion-sd``)."""
        form = pick(random, ("dipgo-gates", "l2c-router", "csv", "smoothcache"))
        gates = _gates(9 if form == "dipgo-gates" else _UNITS)
        label, content = _CHANGES[form](gates, random)
        (folder / "given").write_bytes(content)
        model = "fashion-sd" if form == "dipgo-gates" else str(self.material.class_model)
        argv = ["schedule", "import", form, "given", "--model", model, "--sampler", "ddim", "--steps", str(STEPS)]
        argv += ["-o", "out.json"] + (["--granularity", "layer"] if form == "csv" else [])

        def accepted(ran: Ran) -> tuple[Verdict, str]:
            keep = json.loads((folder / "out.json").read_text())["keep"]
            return judged(form, content, gates, keep)

        return Trial(f"{form}: {label}", [argv], accepted, outputs=("out.json",))


def judged(form: str, content: bytes, gates: np.ndarray, keep: list[str]) -> tuple[Verdict, str]:
    """What was imported has to be what an independent reader of CSV and JSON finds; pickles have none."""
    if form in ("csv", "smoothcache"):
        try:
            rows = _READERS[form](content)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return Verdict.SILENT, f"accepted, but not a right file: {error!r}"
        if rows != keep and rows + rows[-1:] != keep:
            return Verdict.SILENT, f"accepted as {keep}, but the file says {rows}"
    same = keep == ["".join(map(str, row)) for row in gates]
    return (Verdict.SAME if same else Verdict.VALID), ""


def _gates(units: int) -> np.ndarray:
    gates = np.random.default_rng(11).integers(0, 2, (STEPS, units))
    gates[0] = 1
    return gates


def _csv(gates: np.ndarray, random: np.random.Generator) -> Changed:
    text = "\n".join(",".join(map(str, row)) for row in gates) + "\n"
    if random.random() < 0.5:
        return change_bytes(text.encode(), random)
    cells = [line.split(",") for line in text.split()]
    row, column = int(random.integers(len(cells))), int(random.integers(_UNITS))
    cell = pick(
        random,
        (
            "",
            "2",
            "-1",
            "1.0",
            "01",
            " 1",
            "True",
            "nan",
            '"1"',
            "\u0661",
            "\u00b9",
            "1;0",
            "x" * 10**6,
            "1," * 10**6,
            "\x1b[31m",
            "1\r0",
        ),
    )
    cells[row][column] = cell
    how = pick(random, ("cell", "more rows", "rows gone", "names"))
    if how == "more rows":
        cells = cells * min(pick(random, (2, 1000, 100_000)), 4 * 10**6 // (len(cell) + 8) + 1)
    elif how == "rows gone":
        cells = cells[: int(random.integers(len(cells)))]
    elif how == "names":
        cells.insert(0, pick(random, (["transformer_blocks.0.attn1"], ["a", "b", "c", "d"], ["x"] * 4)))
    return f"{how}: {cell[:20]!r} at {row}, {column}", "\n".join(map(",".join, cells)).encode()


def _smoothcache(gates: np.ndarray, random: np.random.Generator) -> Changed:
    return change_json(_by_kind(gates), random, bytes_share=0.3)


def _by_kind(gates: np.ndarray) -> dict[str, Any]:
    names = ("attn-0", "mlp-0", "attn-1", "mlp-1")
    return {name: [int(cell) for cell in gates[:, column]] for column, name in enumerate(names)}


def _l2c_router(gates: np.ndarray, random: np.random.Generator) -> Changed:
    import torch

    scores = torch.linspace(-4, 4, STEPS * _UNITS).reshape(STEPS, _UNITS)
    routers: dict[str, Any] = {f"{step}.prob": row.clone() for step, row in enumerate(scores)}
    if random.random() < 0.3:
        key = pick(random, tuple(routers))
        value = pick(
            random,
            (
                torch.zeros(3),
                torch.zeros(4, 4),
                torch.full((4,), float("nan")),
                torch.zeros(4).int(),
                1,
                "x",
                None,
                torch.zeros(4, dtype=torch.bfloat16),
                torch.zeros(1).expand(4),
            ),
        )
        routers[pick(random, (key, "x.prob", "-1.prob", "999999999.prob", "1"))] = value
        return f"another value under {key}", _saved({"routers": routers})
    content = _saved({"routers": routers})
    if random.random() < 0.5:
        return change_bytes(content, random)
    return _member(content, random)


def _member(content: bytes, random: np.random.Generator) -> Changed:
    """One file inside a zip archive changed, the archive whole again."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = pick(random, tuple(members))
    label, members[name] = (
        _pickle_bytes(members[name], random) if name.endswith(".pkl") else change_bytes(members[name], random)
    )
    if random.random() < 0.1:
        members[pick(random, ("archive/data/99", "../../x", name.upper()))] = members.pop(name)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for key, value in members.items():
            archive.writestr(key, value)
    return f"{name}: {label}", stream.getvalue()


def _dipgo_gates(gates: np.ndarray, random: np.random.Generator) -> Changed:
    import torch

    keys = [*(("down", "block", i, 0) for i in range(4)), ("mid", "mid_block", 0, 0)]
    keys += [("up", "block", i, 0) for i in (3, 2, 1, 0)]
    pairs = {bit: torch.tensor([1.0 - bit, float(bit)]) for bit in (0, 1)}
    document: list[dict[Any, Any]] = [
        {key: _Legacy(pairs[int(bit)]) for key, bit in zip(keys, row, strict=True)} for row in gates
    ]
    if random.random() < 0.2:
        step = int(random.integers(STEPS))
        key = pick(random, (keys[0], ("down", "block", 9, 0), ("up", "resnet", 0, 0), "x", 1, None))
        document[step][key] = pick(
            random,
            (
                1,
                None,
                [0, 1],
                _Legacy(torch.zeros(2)),
                _Legacy(torch.tensor([0.0, 1.0, 0.0])),
                _Legacy(torch.tensor([float("nan"), 1])),
            ),
        )
        return f"step {step}: another value under {key}", pickle.dumps(document, 4)
    return _pickle_bytes(pickle.dumps(document, 4), random)


def _pickle_bytes(content: bytes, random: np.random.Generator) -> Changed:
    """Any bytes changed, opcodes put in, nesting and lists without end."""
    dice = random.random()
    if dice < 0.5:
        return change_bytes(content, random)
    if dice < 0.9:
        code = pick(random, _OPCODES)
        place = int(random.integers(2, len(content)))
        over = len(code) if random.random() < 0.5 else 0
        return f"opcode {code[:12]!r} at {place}", content[:place] + code + content[place + over :]
    code, times = pick(
        random,
        ((b"]", 150_000), (b"(", 150_000), (b"0", 50_000), (b"]\x94", 75_000), (b"\x85", 100_000), (b"NN\x86", 50_000)),
    )
    return f"{code!r} {times} times", content[:2] + code * times + content[2:]


class _Legacy:
    """Pickles a tensor as torch's own (old) pickling does: a call that rebuilds it from its storage's bytes."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __reduce__(self) -> Any:
        return self.tensor.__reduce_ex__(4)


def _saved(document: Any) -> bytes:
    import torch

    stream = io.BytesIO()
    torch.save(document, stream)
    return stream.getvalue()


def _read_csv(content: bytes) -> list[str]:
    rows = [line for line in content.decode("utf-8-sig").splitlines() if line.strip()]
    cells = [[cell.strip() for cell in row.split(",")] for row in rows]
    if cells and not set(cells[0]) <= {"0", "1"}:
        cells = cells[1:]
    if any(cell not in ("0", "1") for row in cells for cell in row):
        raise ValueError("a cell that is neither 0 nor 1")
    return ["".join(row) for row in cells]


def _read_smoothcache(content: bytes) -> list[str]:
    document = strict_json(content)
    columns = []
    for block in range(2):
        for kind in ("attn", "mlp"):
            given = document.get(f"{kind}-{block}", document.get(kind))
            columns.append([1] * max(map(len, document.values())) if given is None else given)
    if any(type(entry) is not int or entry not in (0, 1) for column in columns for entry in column):
        raise ValueError("an entry that is neither 0 nor 1")
    return ["".join(map(str, row)) for row in zip(*columns, strict=True)]


_CHANGES = {"csv": _csv, "smoothcache": _smoothcache, "l2c-router": _l2c_router, "dipgo-gates": _dipgo_gates}
_READERS = {"csv": _read_csv, "smoothcache": _read_smoothcache}

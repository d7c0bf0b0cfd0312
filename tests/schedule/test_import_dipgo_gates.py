from __future__ import annotations

import io
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.importers.dipgo_gates import read_gates
from dipgo_deploy.schedule.importers.pickles import read_pickle
from dipgo_deploy.schedule.importers.registry import import_schedule

PUBLISHED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "published-schedules"
NAMES = (*(f"down_blocks.{i}" for i in range(4)), "mid_block", *(f"up_blocks.{i}" for i in range(4)))
# The order of the released file: ("up", "block", 3) is the first up block to run.
KEYS = (
    *(("down", "block", i, 0) for i in range(4)),
    ("mid", "mid_block", 0, 0),
    *(("up", "block", i, 0) for i in (3, 2, 1, 0)),
)

# --- files as the authors' code writes them, but from a GPU that is not there ---


def storage_bytes(values: list[float], location: str = "cuda:0", kind: str = "FloatStorage", code: str = "f") -> bytes:
    """One storage in torch's legacy file format, assembled by hand (torch cannot save a CUDA storage without CUDA)."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    count = bytes([len(values)])
    root = b"\x80\x02(X\x07\x00\x00\x00storagectorch\n" + kind.encode() + b"\nX\x04\x00\x00\x001234"
    root += b"X" + struct.pack("<I", len(location)) + location.encode() + b"K" + count + b"NtQ."
    parts = [pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2), pickle.dumps(system, 2), root]
    parts += [pickle.dumps(["1234"], 2), struct.pack("<q", len(values)), struct.pack(f"<{len(values)}{code}", *values)]
    return b"".join(parts)


class Named:
    """Pickles as the global ``name``, called with ``arguments`` when there are any."""

    def __init__(self, name: str, *arguments: Any) -> None:
        self.name, self.arguments = name, arguments


class _Writer(pickle._Pickler):  # type: ignore[name-defined]
    """Writes ``Named`` without importing what it names."""

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if not isinstance(obj, Named):
            return super().save(obj, save_persistent_id)
        module, _, attribute = obj.name.rpartition(".")
        super().save(module)
        super().save(attribute)
        self.write(pickle.STACK_GLOBAL)
        super().save(obj.arguments)
        self.write(pickle.REDUCE)
        return None


def dump(document: Any) -> bytes:
    stream = io.BytesIO()
    _Writer(stream, 4).dump(document)
    return stream.getvalue()


def tensor(payload: bytes, offset: int = 0, size: tuple[int, ...] = (2,), stride: tuple[int, ...] = (1,)) -> Named:
    storage = Named("torch.storage._load_from_bytes", payload)
    hooks = Named("collections.OrderedDict")
    return Named("torch._utils._rebuild_tensor_v2", storage, offset, size, stride, False, hooks)


def gate(kept: bool) -> Named:
    return tensor(storage_bytes([float(not kept), float(kept)]))


def released(rows: list[list[bool]], keys: tuple[Any, ...] = KEYS) -> bytes:
    return dump([dict(zip(keys, map(gate, row), strict=True)) for row in rows])


# --- reading ---


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4))
def test_gates_are_read_in_order_of_execution(rows: list[list[bool]]) -> None:
    # KEYS is in order of execution already, so row and result agree cell by cell.
    assert read_gates(released(rows), NAMES) == tuple(map(tuple, rows))


def test_keys_decide_not_their_order() -> None:
    row = [True, True, False, True, False, True, False, False, True]
    shuffled = sorted(zip(KEYS, row, strict=True), key=lambda item: str(item[0])[::-1])
    assert [key for key, _ in shuffled] != list(KEYS)
    data = dump([{key: gate(kept) for key, kept in shuffled}])
    assert read_gates(data, NAMES) == (tuple(row),)


def test_the_last_up_block_is_number_0() -> None:
    gates = read_gates(released([[key != ("up", "block", 0, 0) for key in KEYS]]), NAMES)
    assert dict(zip(NAMES, gates[0], strict=True))["up_blocks.3"] is False
    assert sum(gates[0]) == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int64, torch.bool, torch.uint8])
def test_what_torch_itself_pickles_is_read(dtype: torch.dtype) -> None:
    # Views into one storage too: offset and stride are honoured.
    base = torch.tensor([0, 1, 1, 0, 0, 1]).to(dtype)
    views = [base[0:2], base[2:4], base[1::3]]  # kept, removed, [1, 0] with a stride
    document = [dict(zip(KEYS, [views[0]] * 7 + views[1:], strict=True))]
    assert read_gates(pickle.dumps(document), NAMES) == ((True,) * 7 + (False, False),)


def test_the_released_schedule(unet_target) -> None:
    path = PUBLISHED / "sd15_gates_0.8.pkl"
    if not path.is_file():
        pytest.skip(f"{path.name} is not beside this repository")
    schedule = import_schedule("dipgo-gates", path, unet_target(50))
    kept = {step: {NAMES[k] for k in range(9) if row[k]} for step, row in enumerate(schedule.gates) if any(row)}
    assert list(kept) == [0, 7, 13, 19, 20, 21, 26, 32, 39, 48]
    assert kept.pop(7) == set(NAMES) - {"down_blocks.3"}
    assert all(names == set(NAMES) for names in kept.values())
    longer = import_schedule("dipgo-gates", path, unet_target(51))
    assert longer.keep == (*schedule.keep, "0" * 9)
    assert longer.provenance["parameters"]["last_row_repeated"] == 1


# --- refusing ---


class Evil:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def _calls(marker: Path) -> dict[str, Any]:
    code = f"open({str(marker)!r}, 'w').write('ran')"
    return {
        "posix.system": Evil(os.system, f"touch {marker}"),
        "builtins.eval": Evil(eval, code),
        "builtins.exec": Evil(exec, code),
        "builtins.getattr": Evil(getattr, "text", "join"),
        "builtins.__import__": Evil(__import__, "this"),
    }


@pytest.mark.parametrize("name", _calls(Path()))
@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("place", ["root", "gate", "storage", "storage's inside"])
def test_malicious_pickles_are_refused_and_nothing_runs(tmp_path: Path, name: str, protocol: int, place: str) -> None:
    marker = tmp_path / "ran"
    evil = _calls(marker)[name]
    row = dict(zip(KEYS, [gate(True)] * 9, strict=True))
    if place == "root":
        data = pickle.dumps(evil, protocol)
    elif place == "gate":
        data = pickle.dumps([{**dict.fromkeys(KEYS, 0), KEYS[4]: evil}], protocol)
    elif place == "storage":
        data = pickle.dumps([{KEYS[0]: Evil(torch._utils._rebuild_tensor_v2, evil, 0, (2,), (1,))}], protocol)
    else:
        inner = storage_bytes([0, 1])
        data = dump([{**row, KEYS[4]: tensor(pickle.dumps(evil, protocol) + inner)}])
    path = tmp_path / "evil.pkl"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_gates(data, NAMES)
    message = str(caught.value)
    assert "refused, nothing was run" in message
    assert name in message or "__builtin__" in message  # protocol 2 writes the old module's name
    assert "\n" not in message
    assert not marker.exists()


def test_allowed_names_are_never_called() -> None:
    # torch would run the inner pickle of these bytes; here they are bytes.
    evil = Named("torch.storage._load_from_bytes", pickle.dumps(Evil(os.system, "true")))
    data = dump([dict.fromkeys(KEYS, evil)])
    with pytest.raises(UserError, match="evaluation 0, block down_blocks.0: not a tensor"):
        read_gates(data, NAMES)


@pytest.mark.parametrize(
    "data",
    [
        b"(S'touch ran'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch ran'\no.",  # OBJ
        b"\x80\x02}(X\x01\x00\x00\x00aK\x01ub.",  # BUILD
        b"\x80\x02)\x81.",  # NEWOBJ
        b"\x80\x02\x82\x01.",  # EXT1
        b"P1\n.",  # PERSID
    ],
)
def test_opcodes_that_data_does_not_need_are_refused(data: bytes) -> None:
    with pytest.raises(UserError, match="refused"):
        read_gates(data, NAMES)


def test_a_file_cut_off_anywhere_is_refused() -> None:
    data = released([[True] * 9])
    for length in range(0, len(data) - 1, 7):
        with pytest.raises(UserError):
            read_gates(data[:length], NAMES)
    with pytest.raises(UserError, match="more bytes behind"):
        read_gates(data + b"\x00", NAMES)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_give_data_or_one_line(data: bytes) -> None:
    try:
        read_pickle(io.BytesIO(data))
    except UserError as error:
        assert "\n" not in str(error)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_changed_byte_gives_gates_or_one_line(data: st.DataObject) -> None:
    content = bytearray(released([[True] * 9]))
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        read_gates(bytes(content), NAMES)
    except UserError as error:
        assert "\n" not in str(error)


def test_deeply_nested_data_is_refused_not_followed() -> None:
    nested = b"\x80\x02]}(" + b")" + b"\x85" * 200_000 + b"K\x01ua."
    with pytest.raises(UserError, match="dictionary key"):
        read_gates(nested, NAMES)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (tensor(storage_bytes([0.5, 0.5])), "[0.5, 0.5] is neither [0, 1] (kept) nor [1, 0] (removed)"),
        (tensor(storage_bytes([1, 1])), "[1, 1] is neither"),
        (tensor(storage_bytes([0, 1]), offset=1), "reaches beyond its storage of 8 bytes"),
        (tensor(storage_bytes([0, 1]), offset=-1), "reaches beyond its storage"),
        (tensor(storage_bytes([0, 1, 0]), size=(3,)), "a tensor of 3 elements, not of 2"),
        (tensor(storage_bytes([0, 1]), size=(1, 2), stride=(2, 1)), "not a tensor of one dimension"),
        (tensor(storage_bytes([0, 1])[:-1]), "cut off or malformed"),
        (tensor(storage_bytes([0, 1]) + b"\x00"), "cut off or malformed"),
        (tensor(storage_bytes([0, 1], kind="BFloat16Storage")), "refers to torch.BFloat16Storage"),
        (tensor(b""), "opcode 0: not a complete pickle"),
        (1, "not a tensor of one dimension"),
        (None, "not a tensor of one dimension"),
    ],
)
def test_bad_gates_name_step_and_block(value: Any, words: str) -> None:
    good = dict(zip(KEYS, [gate(True)] * 9, strict=True))
    with pytest.raises(UserError) as caught:
        read_gates(dump([good, {**good, ("mid", "mid_block", 0, 0): value}]), NAMES)
    assert str(caught.value).startswith("evaluation 1, block mid_block: ")
    assert words in str(caught.value)


def test_bad_blocks_are_named() -> None:
    good = dict(zip(KEYS, [gate(True)] * 9, strict=True))
    missing = {key: value for key, value in good.items() if key[0] != "mid"}
    with pytest.raises(UserError, match="evaluation 1: blocks: mid_block of this model is missing"):
        read_gates(dump([good, missing]), NAMES)
    with pytest.raises(UserError, match=r"evaluation 0: blocks: down_blocks.7 is no block of this model"):
        read_gates(dump([{**good, ("down", "block", 7, 0): gate(True)}]), NAMES)
    with pytest.raises(UserError, match=r"evaluation 0: \('down', 'attentions', 0, 1\) is no whole block"):
        read_gates(dump([{**good, ("down", "attentions", 0, 1): gate(True)}]), NAMES)
    with pytest.raises(UserError, match="one dictionary of gates an evaluation"):
        read_gates(dump([]), NAMES)


def test_a_step_0_that_reads_unwritten_caches_is_refused(tmp_path: Path, unet_target) -> None:
    path = tmp_path / "gates.pkl"
    path.write_bytes(released([[key[0] != "mid" for key in KEYS], [True] * 9]))
    with pytest.raises(UserError) as caught:
        import_schedule("dipgo-gates", path, unet_target(2))
    assert f"{path}: keep: evaluation 0, block mid_block: its cache is read before" in str(caught.value)

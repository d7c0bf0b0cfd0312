"""Embeddings from files: one array, or several by the names of a model's conditions."""

from __future__ import annotations

import io
import json
import random
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save, save_file

from dipgo_deploy.cli.arrays import load_array, load_embeds, load_picture
from dipgo_deploy.errors import UserError

STATES = np.arange(6, dtype=np.float32).reshape(1, 2, 3) / 7
MASK = np.ones((1, 2), np.int64)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.save(tmp_path / "states.npy", STATES)
    np.save(tmp_path / "mask.npy", MASK)
    np.save(tmp_path / "a=b.npy", STATES)
    np.savez(tmp_path / "both.npz", states=STATES, mask=MASK)
    np.savez(tmp_path / "pickled.npz", states=np.array([{}], dtype=object))
    save_file({"states": STATES, "mask": MASK}, tmp_path / "both.safetensors")
    save_file({"states": STATES.astype(ml_dtypes.bfloat16)}, tmp_path / "bf16.safetensors")
    save_file({"states": np.ones((1,), np.uint8)}, tmp_path / "bytes.safetensors")
    for name in ("broken.npz", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
    return tmp_path


def test_one_array_is_one_array(folder: Path) -> None:
    assert load_embeds("--prompt-embeds", ()) is None
    for name in ("states.npy", "a=b.npy"):
        np.testing.assert_array_equal(load_embeds("--prompt-embeds", (str(folder / name),)), STATES)


@pytest.mark.parametrize(
    "given", [("states={0}/states.npy", "mask={0}/mask.npy"), ("{0}/both.npz",), ("{0}/both.safetensors",)]
)
def test_several_have_names(folder: Path, given: tuple[str, ...]) -> None:
    found = load_embeds("--prompt-embeds", tuple(text.format(folder) for text in given))
    assert isinstance(found, dict) and set(found) == {"states", "mask"}
    np.testing.assert_array_equal(found["states"], STATES)
    np.testing.assert_array_equal(found["mask"], MASK)
    assert (found["states"].dtype, found["mask"].dtype) == (np.float32, np.int64)


def test_bfloat16_is_widened(folder: Path) -> None:
    found = load_embeds("--prompt-embeds", (str(folder / "bf16.safetensors"),))
    assert isinstance(found, dict) and found["states"].dtype == np.float32
    np.testing.assert_array_equal(found["states"], STATES.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("{0}/states.npy", "mask={0}/mask.npy"), "one of several; give each with its condition's name, NAME="),
        (("mask={0}/mask.npy", "mask={0}/states.npy"), "mask is given twice"),
        (("mask={0}/none.npy",), "--prompt-embeds mask: .*none.npy: no such file"),
        (("{0}/none.npz",), "none.npz: no such file"),
        (("{0}/broken.npz",), "not a .npz file of arrays"),
        (("{0}/pickled.npz",), "not a .npz file of arrays"),
        (("{0}/broken.safetensors",), "not a .safetensors file of arrays"),
        (("{0}/bytes.safetensors",), "not a .safetensors file of arrays .*states has type U8"),
        (("states={0}/both.npz",), "holds several arrays"),
    ],
)
def test_mistakes_are_one_line(folder: Path, given: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_embeds("--prompt-embeds", tuple(text.format(folder) for text in given))
    assert "\n" not in str(caught.value)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def header(text: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + (len(text) + 1).to_bytes(2, "little") + text.encode() + b"\n" + data


def claims(shape: str, dtype: str = "<f4", data: bytes = b"") -> bytes:
    return header(f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}}}", data)


def bomb() -> bytes:
    """A small archive of 400 MB of zeros."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("states.npy", "w", force_zip64=True) as entry,
    ):
        for _ in range(400):
            entry.write(bytes(2**20))
    return file.getvalue()


def overlapping() -> bytes:
    """Two entries that share their bytes."""
    data = bytearray(npz(aa=STATES, bb=STATES))
    second = data.rfind(b"PK\x01\x02")
    data[second + 42 : second + 46] = bytes(4)  # where its bytes begin
    return bytes(data)


HOSTILE = {
    "no magic": (".npy", b"", "the magic string is not correct|EOF"),
    "lie": (".npy", claims("(1000000, 1000000, 1000)"), r"claims 4000000000000000 bytes of values, 0 are there"),
    "lie of many digits": (".npy", claims("(" + "9" * 4000 + ",)"), "claims 4000 bytes|claims 3999"),
    "negative": (".npy", claims("(-1, -4)", data=bytes(16)), r"shape \(-1, -4\)"),
    "trailing": (".npy", claims("(2,)", data=bytes(9)), "claims 8 bytes of values, 9 are there"),
    "cut": (".npy", npy(STATES)[:-1], "claims 24 bytes of values, 23 are there"),
    "objects": (".npy", claims("(1,)", "|O", bytes(8)), "values of type object, needs numbers"),
    "text": (".npy", claims("(1,)", "<U2", bytes(8)), "needs numbers"),
    "records": (
        ".npy",
        header("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}", bytes(4)),
        "numbers",
    ),
    "deep": (".npy", header("(" * 9000), "not a .npy file of numbers"),
    "no dictionary": (".npy", header("[1, 2]"), "not a .npy file of numbers"),
    "bomb": (".npz", bomb, "419430400 bytes when unpacked, more than"),
    "overlap": (".npz", overlapping, "overlaps another entry"),
    "many": (".npz", lambda: npz(**{f"a{i}": STATES for i in range(70)}), "70 arrays, more than 64"),
    "no array": (".npz", lambda: npz(a=np.array("text")), "needs numbers"),
    "lie inside": (".npz", lambda: archive_of(claims("(1000000, 1000000)")), "claims 4000000000000 bytes of values"),
    "cut archive": (".npz", lambda: npz(states=STATES)[:-30], "no zip archive, or cut short"),
    "many floats of a byte": (
        ".safetensors",
        lambda: bytes_of_float8(100 * 2**20),
        "419430400 bytes of values, more than",
    ),
    "lie of safetensors": (".safetensors", lambda: save({"states": STATES})[:-1], "not a .safetensors file of arrays"),
    "long list": (".npz", lambda: archive_of(npy(STATES), name="n" * 65535), "bytes of names"),
}


def bytes_of_float8(count: int) -> bytes:
    header = json.dumps({"states": {"dtype": "F8_E4M3", "shape": [count], "data_offsets": [0, count]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(count)


def archive_of(content: bytes, name: str = "states.npy") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_before_it_takes_memory(tmp_path: Path, case: str) -> None:
    suffix, content, message = HOSTILE[case]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content() if callable(content) else content)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message) as caught:
            load_embeds("--prompt-embeds", (str(path),))
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(f"--prompt-embeds {path}: ") and len(str(caught.value)) < 700


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".png"])
def test_what_is_no_readable_file_is_one_line(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"a{suffix}"

    def load() -> object:
        return load_picture("--image", path) if suffix == ".png" else load_embeds("--image", (str(path),))

    path.mkdir()
    with pytest.raises(UserError, match=f"--image .*a{suffix}: (not a regular|no such) file"):
        load()
    path.rmdir()
    path.write_bytes(b"x")

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("io.open", refuse)
    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(UserError, match=f"--image .*a{suffix}: cannot be read: Permission denied"):
        load()


def test_byte_order_and_column_order_are_followed(tmp_path: Path) -> None:
    for array in (STATES.astype(">f4"), np.asfortranarray(STATES[0])):
        (tmp_path / "a.npy").write_bytes(npy(array))
        found = load_array("--latents", tmp_path / "a.npy")
        assert found is not None and found.dtype == np.dtype(np.float32)
        np.testing.assert_array_equal(found, array)


def picture(format: str, array: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format, **options)
    return file.getvalue()


GREY16 = np.array([[0, 257, 32896], [40000, 65278, 65535]], np.uint16)
COLOURS = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bits_of_grey_become_8(tmp_path: Path, format: str) -> None:
    (tmp_path / "a").write_bytes(picture(format, GREY16))
    found = np.asarray(load_picture("--image", tmp_path / "a"))
    np.testing.assert_array_equal(found[..., 0], [[0, 1, 128], [156, 254, 255]])
    assert (found == found[..., :1]).all()


@pytest.mark.parametrize(("dtype", "what"), [(np.float32, "floats"), (np.int32, "whole numbers")])
def test_32_bits_are_refused(tmp_path: Path, dtype: type, what: str) -> None:
    (tmp_path / "a.tif").write_bytes(picture("TIFF", np.ones((4, 4), dtype)))
    with pytest.raises(UserError, match=f"--image .*a.tif: a picture of 32-bit {what}.*save it with 8 or 16 bits"):
        load_picture("--image", tmp_path / "a.tif")


def test_other_pictures_are_what_diffusers_makes_of_them(tmp_path: Path) -> None:
    load_image = pytest.importorskip("diffusers.utils").load_image
    turned = Image.Exif()
    turned[0x112] = 6
    pictures = [Image.fromarray(COLOURS).convert(mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK")]
    pictures[1].putalpha(Image.fromarray(COLOURS[..., 0]))
    for number, given in enumerate(pictures):
        path = tmp_path / f"{number}.{'jpg' if given.mode == 'CMYK' else 'png'}"
        given.save(path, exif=turned)
        assert load_picture("--image", path).size == (12, 10)
        np.testing.assert_array_equal(np.asarray(load_picture("--image", path)), np.asarray(load_image(str(path))))


def test_a_picture_of_too_many_pixels_is_refused(tmp_path: Path) -> None:
    Image.new("1", (9000, 9000)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="9000 x 9000 pixels, more than 33554432"):
        load_picture("--image", tmp_path / "a.png")


def test_what_is_doubtful_about_a_picture_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = bytearray(picture("JPEG", COLOURS, exif=b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01"))
    (tmp_path / "a.jpg").write_bytes(data)
    assert load_picture("--image", tmp_path / "a.jpg").size == (10, 12)
    assert "a.jpg: read, but: " in caplog.text


def mutated(data: bytes, source: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(source.choice([1, 1, 2, 8])):
        place = source.randrange(min(len(found), source.choice([120, len(found)])))
        length = source.choice([1, 4, 20])
        found[place : place + length] = source.choice(
            [
                b"",
                b"\xff" * length,
                bytes(length),
                source.randbytes(length),
                b"9" * length,
                source.randbytes(2 * length),
            ]
        )
        if not found:
            break
    return bytes(found)


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    source = random.Random(0)
    arrays: list[tuple[str, bytes]] = [
        ("a.npy", npy(STATES)),
        ("a.npz", npz(states=STATES, mask=MASK)),
        ("a.safetensors", save({"states": STATES})),
    ]
    pictures = [("a", picture(format, COLOURS)) for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP")]
    pictures += [("a", picture("TIFF", GREY16)), ("a", picture("PNG", GREY16))]
    readers: list[tuple[Callable[[Path], object], list[tuple[str, bytes]]]] = [
        (lambda path: load_embeds("--prompt-embeds", (str(path),)), arrays),
        (lambda path: load_picture("--image", path), pictures),
    ]
    refused = 0
    for _ in range(400):
        read, files = source.choice(readers)
        name, data = source.choice(files)
        (tmp_path / name).write_bytes(mutated(data, source))
        try:
            read(tmp_path / name)
        except UserError as error:
            refused += 1
            assert len(str(error)) < 800 and str(error).isprintable()
    assert 200 < refused < 400

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from dipgo_deploy.bundle.safetensors_file import TensorFile


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


TWICE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'


def entry(dtype, shape, first, last):
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


def read_tensors(path):
    return {name: tensor.read() for name, tensor in TensorFile(path).tensors.items()}


def test_every_type_as_torch_reads_it(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    every = torch.arange(256, dtype=torch.uint8)
    tensors = {
        "e4m3": every.view(torch.float8_e4m3fn),
        "e5m2": every.clone().view(torch.float8_e5m2),
        "bf16": torch.arange(-3, 3).to(torch.bfloat16) / 7,
        "f16": torch.arange(6).half().reshape(2, 3) / 7,
        "f64": torch.arange(6).double() / 7,
        "i64": torch.tensor(5),
    }
    save_torch(tensors, tmp_path / "a.safetensors", {"about": "x"})
    found = read_tensors(tmp_path / "a.safetensors")
    for name, tensor in tensors.items():
        want = tensor.float().numpy() if name in ("e4m3", "e5m2", "bf16") else tensor.numpy()
        np.testing.assert_array_equal(found[name], want)
        assert found[name].dtype == want.dtype
    assert TensorFile(tmp_path / "a.safetensors").metadata == {"about": "x"}


def test_chunks_are_the_values_in_order(tmp_path):
    values = np.arange(2**22 + 5, dtype=np.float16)
    save_file({"a": values, "b": values[:3]}, tmp_path / "a.safetensors")
    tensor = TensorFile(tmp_path / "a.safetensors").tensors["a"]
    chunks = list(tensor.chunks())
    assert [chunk.size for chunk in chunks] == [2**22, 5]
    np.testing.assert_array_equal(np.concatenate(chunks), values)


def test_an_open_file_stays_the_same_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": np.ones(3, np.float32)}, path)
    opened = TensorFile(path).tensors["a"]
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "b.safetensors")
    (tmp_path / "b.safetensors").replace(path)
    np.testing.assert_array_equal(opened.read(), np.ones(3))


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry("F32", [2], 0, 4)}, b"1234", "not a safetensors file"),
        ({"a": entry("F32", [10**12, 10**12], 0, 4)}, b"1234", "not a safetensors file"),
        ({"a": entry("F32", [2**40], 0, 2**42)}, b"1234", "not a safetensors file"),
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, b"1234", "not a safetensors file"),
        ({"a": entry("F32", [1], -4, 0)}, b"1234", "not a safetensors file"),
        ({"a": entry("F32", [1], 0, 4)}, b"12345678", "not a safetensors file"),
        ({"a": [1]}, b"", "not a safetensors file"),
        (TWICE, b"1234", "the key 'a' stands twice"),
        (b"[" * 100_000, b"", "not a safetensors file"),
        (b"\xff" * 20, b"", "not a safetensors file"),
        ({"a\n": entry("F32", [1], 0, 4)}, b"1234", "a tensor's name is not a name"),
        ({"a" * 10**7: entry("F32", [1], 0, 4)}, b"1234", "a tensor's name is not a name"),
        (b" " * (2**24 + 1), b"", "more than 16777216"),
        ({f"{n}": entry("F32", [0], 0, 0) for n in range(20_001)}, b"", "20001 tensors, more than 20000"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_broken_files_are_refused_in_short(tmp_path, header, data, message):
    path = write(tmp_path / "a.safetensors", header, data)
    with pytest.raises(ValueError, match=message) as caught:
        read_tensors(path)
    assert len(str(caught.value)) < 400 and str(caught.value).isprintable()


@pytest.mark.parametrize("length", [2**63, 2**40, 1000])
def test_a_header_longer_than_the_file(tmp_path, length):
    with pytest.raises(ValueError, match="cut short"):
        TensorFile(write(tmp_path / "a.safetensors", {}, length=length))


def test_a_type_that_is_not_known(tmp_path):
    save_file({"a": np.ones(3, np.uint8)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="a has type U8"):
        read_tensors(tmp_path / "a.safetensors")

"""The file of TensorRT-RTX's compiled kernels, with a runtime cache that only remembers bytes."""

from __future__ import annotations

from pathlib import Path

from dipgo_deploy.backends.tensorrt_kernels import KernelCache


class Cache:
    """Takes only what an equal environment wrote."""

    def __init__(self) -> None:
        self.kernels: list[bytes] = []

    def deserialize(self, data: bytes) -> bool:
        if not data.startswith(b"here:"):
            return False
        self.kernels = data.removeprefix(b"here:").split(b",")
        return True

    def serialize(self) -> bytes:
        return b"here:" + b",".join(self.kernels)


class Config:
    def create_runtime_cache(self) -> Cache:
        return Cache()

    def set_runtime_cache(self, cache: Cache) -> None:
        self.cache = cache


def attached(path: Path) -> tuple[KernelCache, Cache]:
    kernels, config = KernelCache(path), Config()
    kernels.attach(config)
    return kernels, config.cache


def test_kernels_are_kept_and_found_again(tmp_path):
    path = tmp_path / "v00.gpu.kernels"
    kernels, cache = attached(path)
    cache.kernels.append(b"a")
    kernels.save()
    again, found = attached(path)
    assert found.kernels == [b"a"]
    path.unlink()
    again.save()  # nothing new
    assert not path.exists()
    found.kernels.append(b"b")
    again.save()
    assert path.read_bytes() == b"here:a,b"


def test_contexts_of_an_engine_share_it(tmp_path):
    kernels, first = attached(tmp_path / "x")
    config = Config()
    kernels.attach(config)
    assert config.cache is first


def test_what_another_gpu_wrote_is_replaced(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"elsewhere:a")
    kernels, cache = attached(path)
    assert cache.kernels == []
    cache.kernels.append(b"c")
    kernels.save()
    assert path.read_bytes() == b"here:c"


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path):
    kernels, cache = attached(tmp_path / "missing" / "x")
    cache.kernels.append(b"a")
    kernels.save()
    KernelCache(tmp_path / "never").save()
    assert list(tmp_path.iterdir()) == []

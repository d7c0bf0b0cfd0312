"""Makes the helpers beside this file (``toy_engine``) and the repository's ``tools`` importable from all tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from devices import no_gpu  # noqa: E402

from dipgo_deploy.backends.tensorrt_flavour import FLAVOURS, import_flavour  # noqa: E402
from dipgo_deploy.errors import UserError  # noqa: E402


@pytest.fixture(scope="module")
def traced_once() -> Iterator[None]:
    """``shared_traces`` for a file, which asks for it with ``pytestmark``."""
    from shared_traces import shared_traces

    with shared_traces():
        yield


@pytest.fixture(
    params=[
        *(pytest.param((name, True), id=f"{name}-simulated") for name in FLAVOURS),
        *(
            pytest.param((name, False), id=name, marks=[pytest.mark.gpu, pytest.mark.skipif(no_gpu(), reason="no GPU")])
            for name in FLAVOURS
        ),
    ]
)
def tensorrt_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a TensorRT backend that can be created: on the GPU that is here, and on a simulated one everywhere."""
    name, simulated = request.param
    if simulated:
        from simulated_gpu import install

        install(monkeypatch)
    else:
        try:
            import_flavour(FLAVOURS[name])
        except UserError as error:
            pytest.skip(str(error))
    return name

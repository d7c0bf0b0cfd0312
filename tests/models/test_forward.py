from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from dipgo_deploy.models.forward import replaced_forward  # noqa: E402


def test_what_the_module_had_before_comes_back() -> None:
    module = torch.nn.Identity()
    with pytest.raises(RuntimeError, match="inside"), replaced_forward(module, lambda value: value + 1):
        assert module(1) == 2
        with replaced_forward(module, lambda value: value + 2):
            assert module(1) == 3
        assert module(1) == 2
        raise RuntimeError("inside")
    assert module(1) == 1 and "forward" not in module.__dict__

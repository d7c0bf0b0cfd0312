"""Other forms of a graph compute the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from dipgo_deploy.export.program import to_onnx
from tools.bench import forms


class _Attention(torch.nn.Module):
    """Self-attention behind three products of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = [part(x).view(2, 6, 2, 4).transpose(1, 2) for part in self.parts]
        joined = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2)
        return joined.reshape(2, 6, 8)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import onnx_ir as ir

    torch.manual_seed(0)
    model = to_onnx(
        _Attention(), [torch.randn(2, 6, 8)], ["x"], lambda: ["y"], dtype="fp32", prefix="", label="attention"
    )
    file = tmp_path_factory.mktemp("forms") / "graph.onnx"
    ir.save(model, file)
    return file


def test_every_form_is_found_and_computes_the_same(graph: Path) -> None:
    found = forms.measured_forms(graph, 1, 3, lambda line: None)
    assert {name: facts["places"] for name, facts in found.items()} == {
        "as exported": 0,
        "keys transposed once": 1,
        "queries, keys and values in one product": 1,
        "Attention of opset 23": 1,
        "MultiHeadAttention": 1,
        "MultiHeadAttention and one product": 2,
    }
    nodes = [facts["nodes"] for facts in found.values()]
    assert all(fewer < nodes[0] for fewer in nodes[1:])
    assert all(facts["difference"] < 1e-5 and facts["times_exported"]["median"] > 0 for facts in found.values())
    assert list(graph.parent.iterdir()) == [graph]
    row = {"model": "attention", "latent": [1, 1], "machine": forms.machine(1), "forms": found}
    assert "| MultiHeadAttention and one product | 2 |" in forms.as_text([row])


def test_a_name_of_a_full_size_model_asks_for_a_folder() -> None:
    result = CliRunner().invoke(forms.command, ["sd-1.5-512", "--json"])
    assert result.exit_code != 0 and "--work" in str(result.exception)

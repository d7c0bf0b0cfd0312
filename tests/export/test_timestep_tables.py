"""What depends on the timestep alone becomes tables: on small graphs, and a whole engine directory against the same
without tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from family_checks import loop_report, plan_for, schedule_for, with_gates
from lora_files import make_updates, save_lora
from safetensors.torch import load_file, save_file
from tiny_denoisers import wan_transformer
from torch import nn

from dipgo_deploy.backends import create_backend
from dipgo_deploy.bundle.directory import Bundle, reseal
from dipgo_deploy.bundle.weights import WeightsIndex
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.exporter import PlannedExport, publish
from dipgo_deploy.export.program import to_onnx
from dipgo_deploy.export.timestep_tables import TimestepTables, take_out_tables
from dipgo_deploy.lora.file import LoraChoice
from dipgo_deploy.lora.merge import merge_loras
from dipgo_deploy.runtime.loop import DenoisingLoop

IMAGES = 4


class Modulated(nn.Module):
    """latent (4, 6) times what is made of the timestep, where a comparison of that says so."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(2, width), nn.Linear(width, 12)
        self.last = nn.Linear(6, 6)

    def forward(self, latent: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        time = timestep.expand(latent.shape[0])[:, None] / 1000
        made = self.second(nn.functional.silu(self.first(torch.cat([time.sin(), time.cos()], dim=1))))
        scale, shift = made.chunk(2, dim=1)
        return torch.where(shift > 0, self.last(latent) * torch.tanh(scale), latent)


class Mixed(Modulated):
    """The timestep meets the latent before any product."""

    def forward(self, latent: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.last(latent + timestep)


def exported(module: nn.Module) -> ir.Model:
    arguments = [torch.randn(IMAGES, 6), torch.tensor([500.0])]
    names, label = ["latent", "timestep"], type(module).__name__
    return to_onnx(module.eval(), arguments, names, lambda: ["out"], dtype="fp32", prefix="", label=label)


def run(model: ir.Model, inputs: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    return session.run(None, {value.name: inputs[value.name] for value in session.get_inputs()})[0]


def taken(model: ir.Model) -> TimestepTables:
    tables = take_out_tables(model, IMAGES, always=True)
    assert tables is not None
    return tables


def test_a_row_takes_the_place_of_what_made_it():
    module = Modulated()
    model = exported(module)
    tables = taken(model)
    # One row for all images, of the last product; what follows it (halves, a comparison) stays in the graph.
    assert tables.part.shapes == {"table.second": (1, 12)}
    assert tables.part.row_bytes(1) == 48
    assert tables.part.parameters == ("first.bias", "first.weight", "second.bias", "second.weight")
    weights = 4 * (2 * 64 + 64 + 64 * 12 + 12)
    assert weights <= tables.part.nbytes < weights + 64  # and some scalars
    assert {value.name for value in model.graph.inputs} == {"latent", "timestep", "table.second"}
    products = [node.op_type for node in model.graph if node.op_type in ("Gemm", "MatMul")]
    assert len(products) == 1  # of the latent
    timesteps = [999.0, 500.25, 0.0]
    rows = tables.rows(timesteps)["table.second"]
    assert rows.shape == (3, 1, 12) and rows.dtype == np.float32
    latent = np.random.default_rng(0).standard_normal((IMAGES, 6)).astype(np.float32)
    for place, timestep in enumerate(timesteps):
        time = np.array([timestep], np.float32)
        actual = run(model, {"latent": latent, "timestep": time, "table.second": rows[place]})
        with torch.no_grad():
            expected = module(torch.from_numpy(latent), torch.from_numpy(time)).numpy()
        np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_where_nothing_depends_on_the_timestep_alone_nothing_changes():
    model = exported(Mixed())
    before = ir.to_proto(model).SerializeToString()
    assert take_out_tables(model, IMAGES, always=True) is None
    assert ir.to_proto(model).SerializeToString() == before


def test_by_default_only_where_it_saves_enough():
    assert take_out_tables(exported(Modulated()), IMAGES, always=False) is not None  # nearly all of its weights
    heavy = Modulated(width=1)
    heavy.last = nn.Sequential(nn.Linear(6, 400), nn.Linear(400, 6))
    assert take_out_tables(exported(heavy), IMAGES, always=False) is None
    assert take_out_tables(exported(heavy), IMAGES, always=True) is not None


def test_images_with_rows_of_their_own_are_refused():
    class Own(Modulated):
        def forward(self, latent: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            time = timestep / torch.arange(1, 5)
            return latent * self.second(self.first(torch.stack([time, time], dim=1)))[:, :6]

    with pytest.raises(UserError, match="table.second: has other values for each image.*--no-timestep-tables"):
        taken(exported(Own())).rows([500.0])


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan") / "model"
    wan_transformer().save_pretrained(folder)
    return folder


CHOICES: dict[str, Any] = {"sampler": "flow-euler", "ratio": 0.4, "steps": 4}
SETTINGS: dict[str, Any] = {"components": False, "height": 16, "width": 16, "num_frames": 5, "check": False}


def planned_for(wan: Path, **options: Any) -> PlannedExport:
    return plan_for(wan, schedule_for(wan, **CHOICES), **SETTINGS, **options)


@pytest.fixture(scope="module")
def planned(wan: Path) -> PlannedExport:
    return planned_for(wan)


@pytest.fixture(scope="module")
def with_tables(planned: PlannedExport, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return publish(planned, tmp_path_factory.mktemp("tables") / "on")


def test_both_layouts_equal_the_supernet_and_the_export_without_tables(
    wan: Path, planned: PlannedExport, with_tables: Bundle, tmp_path: Path
):
    assert planned.options.timestep_tables is True  # the default: they save enough here
    plain = publish(planned_for(wan, timestep_tables=False), tmp_path / "off")
    segments = with_gates(planned, planned.schedule, tmp_path / "segments", layout="segments")
    assert segments.manifest.plan.layout == "segments"
    sizes = {}
    for bundle in (with_tables, segments, plain):
        report = loop_report(bundle.path)
        assert report.first_failure() is None
        assert report.results is not None and report.results.tensors[0].relative < 1e-5
        sizes[bundle.path] = (bundle.path / "graphs/weights.bin").stat().st_size
    assert sizes[with_tables.path] == sizes[segments.path] < 0.9 * sizes[plain.path]
    assert with_tables.manifest.format_version == 6 and plain.manifest.format_version < 6
    manifest = with_tables.manifest
    assert set(manifest.plan.table_timesteps) == {launch.timestep for launch in manifest.plan.launches}
    parameters = WeightsIndex.load(with_tables.path / "graphs").tabled
    assert "condition_embedder.time_embedder.linear_1.weight" in parameters
    assert not {stored.parameter for stored in WeightsIndex.load(with_tables.path / "graphs").tensors.values()} & {
        *parameters
    }


@pytest.mark.slow
def test_half_precision(wan: Path, tmp_path: Path):
    bundle = publish(planned_for(wan, dtype="fp16"), tmp_path / "fp16")
    assert bundle.manifest.plan.table_timesteps
    assert loop_report(bundle.path).first_failure() is None


def test_another_timestep_is_refused(with_tables: Bundle):
    loop = DenoisingLoop(with_tables, create_backend("cpu", threads=1))
    conditions = {spec.name: np.zeros(spec.shape, np.float32) for spec in with_tables.manifest.conditions}
    launch = loop.launches[0]
    latent = np.zeros(loop.sample_shape, np.float32)
    prediction, _ = loop.evaluate(launch.step, latent, conditions, timestep=launch.timestep)
    assert prediction is not None
    with pytest.raises(UserError, match=f"evaluation {launch.step} has tables for the timestep {launch.timestep}"):
        loop.evaluate(launch.step, latent, conditions, timestep=launch.timestep + 1)


def test_a_lora_that_would_change_them_is_refused(with_tables: Bundle, tmp_path: Path):
    layers = ["blocks.0.attn1.to_q", "condition_embedder.time_proj"]
    file = save_lora(tmp_path / "lora.safetensors", make_updates(wan_transformer(), layers))
    with pytest.raises(UserError, match="1 of its 2 layers of the denoiser became tables of timesteps at export"):
        merge_loras(with_tables, [LoraChoice(file)])
    partial = merge_loras(with_tables, [LoraChoice(file, partial=True)])
    assert partial.reports[0].applied == 1


def test_whoever_may_read_the_weights_may_read_them(with_tables: Bundle) -> None:
    graphs = with_tables.path / "graphs"
    assert (graphs / "tables.safetensors").stat().st_mode == (graphs / "weights.bin").stat().st_mode


@pytest.mark.parametrize("harm", ["lost", "shape", "no table", "no row"])
def test_tables_that_do_not_fit_are_refused(with_tables: Bundle, tmp_path: Path, harm: str):
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in with_tables.path.rglob("*"):
        if path.is_file():
            (folder / path.relative_to(with_tables.path)).parent.mkdir(parents=True, exist_ok=True)
            (folder / path.relative_to(with_tables.path)).write_bytes(path.read_bytes())
    file = folder / "graphs/tables.safetensors"
    tables = load_file(file)
    name = sorted(tables)[0]
    if harm == "no row":
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["plan"]["table_timesteps"][0] += 1
        (folder / "manifest.json").write_text(json.dumps(manifest))
    elif harm == "lost":
        file.write_bytes(b"")
    else:
        table = tables.pop(name)
        save_file(tables | ({name: table[:-1].contiguous()} if harm == "shape" else {}), file)
    message = {
        "lost": "tables.safetensors: ",
        "shape": f"{name} is F32",
        "no table": f"has no tensor {name}",
        "no row": "there is no row of tables for its timestep",
    }[harm]
    with pytest.raises(UserError, match=message):
        DenoisingLoop(reseal(folder), create_backend("cpu", threads=1))

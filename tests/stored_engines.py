"""Engine files with their records beside the graphs, as a build would leave them. No TensorRT needed."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dipgo_deploy.backends.tensorrt_cuda import Device
from dipgo_deploy.backends.tensorrt_plans import (
    BuildFlags,
    GpuTarget,
    KeyInputs,
    PlanRecord,
    WeightHashes,
    plan_name,
    plans_folder,
    profile_of,
)
from dipgo_deploy.bundle.files import sha256_file
from dipgo_deploy.bundle.manifest import Graph

L4 = Device(name="NVIDIA L4", capability="8.9", memory_bytes=24 * 2**30)
VERSION = "11.4.0.106"


def store_engine(
    engine_dir: Path,
    graph: Graph,
    backend: str = "tensorrt",
    version: str = VERSION,
    target: GpuTarget | None = None,
    plan: bytes = b"engine",
    **flags: bool,
) -> Path:
    """The engine of one graph; returns its file."""
    target = target or GpuTarget(gpu=L4.name, capabilities=(L4.capability,))
    inputs = KeyInputs(
        graph=sha256_file(engine_dir / graph.file),
        weights=WeightHashes().digest(engine_dir / graph.file)[0],
        profile=profile_of(graph),
        flags=BuildFlags(**flags),
        backend=backend,
        version=version,
        target=target,
    )
    record = PlanRecord(
        key=inputs.key,
        inputs=inputs,
        plan_sha256=hashlib.sha256(plan).hexdigest(),
        plan_bytes=len(plan),
        weights_bytes=0,
        seconds=0.0,
    )
    path = plans_folder(engine_dir, backend, version, target) / f"{plan_name(graph)}.plan"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(plan)
    path.with_suffix(".json").write_text(record.model_dump_json())
    return path

"""Exports that hold the weights once: in the export's dtype, or not at all where the file has it, mapped.

diffusers maps safetensors files into memory, so that a float32 model costs nothing until its weights are read, and a
mapped page can be given back at any time. What costs memory is another dtype (a copy of each weight) and the comparison
with the supernet (a float32 model, and ONNX Runtime's own weights).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dipgo_deploy.errors import ToleranceError, UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dipgo_deploy.export.exporter import PlannedExport

_MADV_DONTNEED = 4


def convert_in_place(module: nn.Module, dtype: torch.dtype) -> bool:
    """Convert a module whose weights are mapped from a file, one at a time, giving back the pages of each.

    Returns False, and does nothing, for a model that keeps some of its weights in float32.
    """
    if any(getattr(part, "_keep_in_fp32_modules", None) for part in module.modules()):
        return False
    mapped = _mapped_files()
    for parameter in module.parameters():
        if not parameter.is_floating_point() or parameter.dtype == dtype:
            continue
        old = parameter.data
        parameter.data = old.to(dtype)
        _give_back(old, mapped)
    for part in module.modules():
        for name, buffer in part._buffers.items():
            # Loading in another dtype leaves what is not in the file (tables of positions) as it was made.
            stored = name not in part._non_persistent_buffers_set
            if stored and buffer is not None and buffer.is_floating_point():
                part._buffers[name] = buffer.to(dtype)
    return True


def release(planned: PlannedExport) -> None:
    """Drop the weights of a planned export whose graphs are written; it cannot be written again."""
    for value in planned.traced.model.graph.initializers.values():
        value.const_value = None
    planned.source.denoiser.to("meta")


def check_in_process(engine_dir: Path, model: str) -> None:
    """Compare the graphs of a written engine directory with the supernet, in a process of its own.

    Raises:
        ToleranceError: as ``check_variants``. UserError: the process failed.
    """
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
    command = [sys.executable, "-m", __name__, str(engine_dir), model]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    if done.returncode == 1:
        raise ToleranceError(last)
    if done.returncode:
        raise UserError(f"the comparison with the supernet ended with status {done.returncode}: {last}")


def _compare(engine_dir: Path, model: str) -> None:
    """What the process does."""
    from dipgo_deploy.bundle.directory import Bundle
    from dipgo_deploy.compare.conditions import reference_inputs
    from dipgo_deploy.compare.recording import Recorder, run_until_complete
    from dipgo_deploy.compare.reference import load_reference
    from dipgo_deploy.export.check import compare_recordings
    from dipgo_deploy.export.conditions import corners

    whole = Bundle.open(engine_dir)
    ranges = whole.manifest.sizes
    for sizes in (whole.manifest.usual_sizes,) if ranges is None else corners(ranges):
        bundle = whole.at(sizes)
        manifest, plan = bundle.manifest, bundle.manifest.plan
        reference = load_reference(bundle, model)
        inputs = reference_inputs(
            reference.source,
            reference.conditions,
            (manifest.batch, manifest.latent.channels, manifest.latent.height, manifest.latent.width),
            noises=plan.noises,
            guidance=manifest.guidance,
            begin=reference.begin,
        )
        launches = [(launch.step, launch.variant) for launch in plan.launches]
        recorder = Recorder(plan.variants, launches, inputs.guidance_scale, plan.slots)
        run_until_complete(
            recorder,
            reference.supernet,
            reference.scheduler,
            reference.schedule.sampler.num_inference_steps,
            reference.schedule.gates,
            inputs,
            reference.set_timesteps,
        )
        tolerance = reference.source.family.tolerances[manifest.dtype]
        del reference
        compare_recordings(recorder.recordings, plan.variants, engine_dir, tolerance, None if ranges is None else sizes)


def _mapped_files() -> list[tuple[int, int]]:
    """Addresses at which weights files are mapped."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return []
    found = []
    for line in maps.read_text().splitlines():
        if line.endswith(".safetensors"):
            start, _, end = line.split(None, 1)[0].partition("-")
            found.append((int(start, 16), int(end, 16)))
    return found


def _give_back(tensor: torch.Tensor, mapped: list[tuple[int, int]]) -> None:
    """Drop the whole pages of a tensor that lies in a mapped file; they would be read again if they were needed."""
    start = tensor.data_ptr()
    end = start + tensor.nbytes
    if not any(first <= start and end <= last for first, last in mapped):
        return
    page = mmap.PAGESIZE
    start, end = -(-start // page) * page, end // page * page
    if end > start:
        libc: Any = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def _main() -> int:
    from dipgo_deploy.export.quiet import quiet_libraries

    quiet_libraries()
    try:
        _compare(Path(sys.argv[1]), sys.argv[2])
    except ToleranceError as error:
        print(error, file=sys.stderr)
        return 1
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_main())

"""The same loop by torch: the float32 reference, and the peers in fp16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tools.gpu.measure import Runner
from tools.gpu.models import GUIDANCE_SCALE, Inputs

if TYPE_CHECKING:
    import torch

    from dipgo_deploy.schedule.document import Schedule


def torch_loop(
    weights: Path,
    schedule: Schedule,
    inputs: Inputs,
    dtype: torch.dtype,
    wrap: Callable[[Any], Any] | None = None,
    device: str = "cuda",
) -> Callable[[], np.ndarray]:
    """The supernet's loop: diffusers' own forward and scheduler, with the schedule's gates."""
    import torch

    from dipgo_deploy.sampler import make_scheduler
    from dipgo_deploy.supernet.gated import Supernet
    from dipgo_deploy.supernet.load import load_denoiser
    from dipgo_deploy.supernet.loop import run_loop

    model, family, config = load_denoiser(weights, dtype)
    model.to(device).requires_grad_(False)
    if wrap is not None:
        wrap(model)
    specs = family.blocks(config, schedule.model.granularity)
    supernet = Supernet(model, specs, [schedule.cache_kinds[spec.name] for spec in specs], family.call)
    scheduler = make_scheduler(schedule.sampler.class_name, schedule.sampler.config)
    latents = torch.from_numpy(inputs.latents).to(device)
    steps = schedule.sampler.num_inference_steps
    conditions = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in ((name, torch.from_numpy(array).to(device)) for name, array in inputs.conditions.items())
    }

    def call() -> np.ndarray:
        with torch.no_grad():
            final = run_loop(
                supernet,
                scheduler,
                schedule.gates,
                latents,
                conditions,
                num_inference_steps=steps,
                guidance_scale=GUIDANCE_SCALE,
                set_timesteps_kwargs=family.set_timesteps(config, scheduler.config, *latents.shape[2:], steps),
            )
        result: np.ndarray = final.float().cpu().numpy()
        return result

    return call


def torch_runner(weights: Path, schedule: Schedule, inputs: Inputs, how: str) -> Runner:
    """A torch peer in fp16: ``eager``, or its blocks compiled (``cudagraph``: into captured CUDA graphs)."""
    import torch

    def compiled(model: Any) -> None:
        # Block by block: the blocks that a schedule skips are whole modules, and the model's own forward has hooks.
        mode = "reduce-overhead" if how == "cudagraph" else None
        for module in model.children():
            for block in module if isinstance(module, torch.nn.ModuleList) else [module]:
                block.compile(mode=mode)

    call = torch_loop(weights, schedule, inputs, torch.float16, None if how == "eager" else compiled)
    return Runner(call, torch.cuda.current_stream(), {"torch_peak_bytes": torch.cuda.max_memory_allocated()})

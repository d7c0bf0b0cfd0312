"""One graph through TensorRT's parser and builder."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dipgo_deploy.backends.base import ChangedWeights
from dipgo_deploy.backends.tensorrt import collecting_logger, compare_interface, describe, feed_model
from dipgo_deploy.backends.tensorrt_flavour import Flavour, unsuited
from dipgo_deploy.backends.tensorrt_plans import KeyInputs
from dipgo_deploy.bundle.manifest import Graph
from dipgo_deploy.engine import timing_cache
from dipgo_deploy.engine.phases import Phases
from dipgo_deploy.errors import UserError, one_line

CURRENT = "current"


class CancelledError(Exception):
    """The build was stopped because it was asked to."""


@dataclass(frozen=True)
class Work:
    """One engine to build: the ONNX file, its manifest entry, what goes into the key, and the shared timing cache.

    weights: what takes the place of the file's weights (``inputs.lora`` says that something does).
    """

    onnx_file: Path
    graph: Graph
    inputs: KeyInputs
    timing_cache: Path | None = None
    for_device: bool = False
    weights: ChangedWeights | None = None


def build_plan(
    flavour: Flavour,
    module: Any,
    work: Work,
    *,
    cancelled: threading.Event,
    on_progress: Callable[[float], None],
    warn: Callable[[str], None],
) -> Any:
    """Parse, check against the manifest, and build. Returns the serialized engine, a buffer.

    Blocks until the build is done; ``cancelled`` stops it at TensorRT's next step.

    Raises:
        CancelledError: ``cancelled`` was set.
        UserError: the parser refuses a node, inputs or outputs are not the manifest's, or the builder fails.
    """
    logger = collecting_logger(module)
    builder = module.Builder(logger)
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    changed = {} if work.weights is None else work.weights.of(work.onnx_file)  # must outlive parser and network
    parser = module.OnnxParser(network, logger)
    if not feed_model(parser, work.onnx_file, changed):
        raise UserError(f"{work.onnx_file}: {flavour.title} refuses it: {_parser_errors(parser)}")
    check_network(work.onnx_file, network, work.graph)
    config = builder.create_builder_config()
    _configure(flavour, module, builder, network, config, work)
    if work.timing_cache is not None and not timing_cache.attach(config, work.timing_cache):
        warn(f"{work.timing_cache}: of another version or GPU, or damaged: not used, and replaced by this build's")
    config.progress_monitor = monitor = _monitor(module, cancelled, on_progress)
    plan = builder.build_serialized_network(network, config)
    del monitor  # it had to live until here
    if cancelled.is_set():
        raise CancelledError
    if plan is None:
        reasons = logger.messages[-2:]
        target = work.inputs.target
        if target.gpu is not None:
            reasons += unsuited(flavour, module, target.gpu, target.capabilities[0])
        raise UserError(f"{work.onnx_file}: {flavour.title} cannot build it: {'; '.join(reasons) or 'no reason given'}")
    if work.timing_cache is not None:
        timing_cache.merge(config, work.timing_cache)
    return plan


def check_network(path: Path, network: Any, graph: Graph) -> None:
    """Compare the parsed network's inputs and outputs with the manifest's.

    Raises:
        UserError: names the first tensor whose presence, dtype or shape differs.
    """
    found = {}
    for mode, count, get in (
        ("input", network.num_inputs, network.get_input),
        ("output", network.num_outputs, network.get_output),
    ):
        for index in range(count):
            tensor = get(index)
            found[tensor.name] = describe(mode, tensor.dtype, tensor.shape)
    compare_interface(path, found, graph)


def _configure(flavour: Flavour, module: Any, builder: Any, network: Any, config: Any, work: Work) -> None:
    inputs = work.inputs
    flags, enum = inputs.flags, module.BuilderFlag
    # On by default in TensorRT: the latents' sum and every fp32 product would be rounded to 10 bits.
    (config.set_flag if flags.tf32 else config.clear_flag)(enum.TF32)
    if flags.workspace is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, flags.workspace)
    if flags.opt_level is not None:
        config.builder_optimization_level = flags.opt_level
    config.max_aux_streams = flags.max_aux_streams
    if flags.user_allocation and flavour.user_allocation:
        config.set_flag(enum.REQUIRE_USER_ALLOCATION)
    if flags.version_compatible:
        config.set_flag(enum.VERSION_COMPATIBLE)
    if flags.hardware_compatible:
        config.hardware_compatibility_level = module.HardwareCompatibilityLevel.AMPERE_PLUS
    if flags.strip:
        config.set_flag(enum.STRIP_PLAN)
    if flags.refit:
        config.set_flag(enum.REFIT)
    elif flags.strip:
        config.set_flag(enum.REFIT_IDENTICAL)  # plain REFIT can drop a bias
    if flavour.compute_capabilities and work.for_device:
        config.num_compute_capabilities = 1
        _require(config.set_compute_capability(module.ComputeCapability.CURRENT, 0), flavour, inputs)
    elif flavour.compute_capabilities and inputs.target.capabilities:
        names = ["SM" + capability.replace(".", "") for capability in inputs.target.capabilities]
        config.num_compute_capabilities = len(names)
        for index, name in enumerate(names):
            _require(config.set_compute_capability(getattr(module.ComputeCapability, name), index), flavour, inputs)
    if any(-1 in network.get_input(index).shape for index in range(network.num_inputs)):
        profile = builder.create_optimization_profile()
        for name, shapes in inputs.profile.items():
            profile.set_shape(name, shapes.min, shapes.opt, shapes.max)
        if config.add_optimization_profile(profile) < 0:
            raise UserError(f"{work.onnx_file}: {flavour.title} refuses the ranges of its sizes; export other ones")


def _require(accepted: bool, flavour: Flavour, inputs: KeyInputs) -> None:
    if not accepted:
        wanted = ", ".join(inputs.target.capabilities)
        raise UserError(f"--compute-capability {wanted}: {flavour.title} {inputs.version} does not build for it")


def _parser_errors(parser: Any) -> str:
    found = []
    for index in range(min(parser.num_errors, 3)):
        error = parser.get_error(index)
        found.append(f"node {error.node_name()} ({error.node_operator()}): {one_line(error.desc(), 300)}")
    return "; ".join(found) or "no reason given"


def _monitor(module: Any, cancelled: threading.Event, on_progress: Callable[[float], None]) -> Any:
    class Monitor(module.IProgressMonitor):
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self._phases = Phases()
            self._lock = threading.Lock()  # TensorRT may call from several threads

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._lock:
                self._phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                self._phases.step(phase_name, step)
                on_progress(self._phases.fraction)
            return not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                self._phases.finish(phase_name)

    return Monitor()

"""Weights and activations in 8 bits, whole numbers or floats: scales from the directory's own loop, blocks that lose
most left out.

It works on a directory as it was written in floats: the loop runs, then the graphs are written anew.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dipgo_deploy.backends.onnxruntime_cuda import FATAL
from dipgo_deploy.backends.onnxruntime_pairs import UNFUSED, leave_pairs
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import Calibration, Manifest, QuantizationEntry
from dipgo_deploy.bundle.prologue import PROLOGUE_NAME
from dipgo_deploy.bundle.quantized import MATRIX_TYPES, Method
from dipgo_deploy.bundle.weights import WeightsIndex
from dipgo_deploy.difference import relative_rms
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.activations import activations, quantize_activations
from dipgo_deploy.export.quantized import Made, quantize_weights, weight_form
from dipgo_deploy.export.ranges import RangeRecorder, Recorded
from dipgo_deploy.export.stored import StoredParameter, note_parameter, stored_parameter
from dipgo_deploy.export.weights import INLINE_BYTES, write_graphs
from dipgo_deploy.runtime.given_pictures import picture_conditions
from dipgo_deploy.runtime.pipeline import Pipeline
from dipgo_deploy.runtime.requests import class_condition, classes_of, text_conditions

if TYPE_CHECKING:
    import onnx_ir as ir

BESIDE = "(beside the blocks)"
BUDGET = 0.05
PROMPTS = (
    "a photo of a cat on a sofa",
    "a red car on a mountain road",
    "a portrait of an old man, oil painting",
    "a bowl of fruit",
)
_SCALE = 4.0  # of a denoiser without a pipeline, which has no default
_NUMBERS = "quantized.bin"


@dataclass(frozen=True)
class Request:
    """What is asked for. method: one of ``ACTIVATIONS``. samples: runs that are recorded.

    prompts: of a text model, in turn; none: ``PROMPTS``. budget: the largest error of a launch, root mean square of the
    difference over that of the value.
    """

    method: Method
    samples: int = 4
    prompts: tuple[str, ...] = ()
    budget: float = BUDGET


def check_recordable(manifest: Manifest, method: Method) -> None:
    """Refuse (UserError) what no loop can be recorded of here."""
    instead = "use --quantize int8-weights, which needs no recording"
    if manifest.dtype == "bf16":
        raise UserError(f"--quantize {method}: bf16 graphs do not run on a CPU, where ranges are recorded; {instead}")
    if picture_conditions(manifest) or manifest.sampler.strength is not None:
        raise UserError(f"--quantize {method}: the loop needs pictures, and none are here to record it with; {instead}")
    if text_conditions(manifest) and manifest.components.text_encoder is None:
        raise UserError(
            f"--quantize {method}: without components there is no text to record the loop with; leave --no-components "
            f"out, or {instead}"
        )


def quantize_directory(
    stage: Path,
    manifests: Sequence[Manifest],
    blocks: Mapping[str, Sequence[str]],
    request: Request,
    notify: Callable[[str], None],
) -> QuantizationEntry:
    """Write the denoiser's graphs of a directory anew, in 8 bits, and say what was done.

    manifests: of all its schedules, as they were written with the graphs in floats. blocks: name of a block -> modules
    that are its own.

    Raises:
        UserError: no loop can be recorded, see ``check_recordable``, or a run's latents are not finite.
    """
    folder = stage / Path(manifests[0].plan.variants[0].graph.file).parent
    graphs = sorted({variant.graph.file for manifest in manifests for variant in manifest.plan.variants})
    owner, method = _Owner(blocks, request.method), request.method
    index = WeightsIndex.load(folder)
    models = {file: _load(stage / file, index) for file in graphs}
    notify("recording ranges of activations")
    chosen = _covering(models, owner, {v.graph.file: v.macs for m in manifests for v in m.plan.variants})
    watched = {file: activations(model, method) for file, model in models.items()}
    recorder = RangeRecorder(watched, frozenset(chosen.values()))
    for manifest in manifests:
        _record(Pipeline(Bundle(stage, manifest), recorder, lazy=True), request)
    prologue = [path for path in (folder / f"{PROLOGUE_NAME}.onnx",) if path.is_file()]
    made: Made = {}
    every = [*models.values(), *(_load(path, index) for path in prologue)]
    quantize_weights(every, method, made=made)
    made = _written(made, folder)
    notify(f"measuring {len(chosen)} blocks in 8 bits")
    trial = _Trial(stage, folder, index, made, recorder.recorded, owner, method)
    sensitivity = {block: trial.error(file, partial(operator.ne, block)) for block, file in chosen.items()}
    kept, error = _within(sensitivity, frozenset(chosen.values()), trial, request.budget)
    notify("writing the graphs in 8 bits")
    final = {file: _load(stage / file, index) for file in graphs}
    others = [_load(path, index) for path in prologue]
    entry = quantize_weights([*final.values(), *others], method, lambda parameter: owner.of(parameter) in kept, made)
    for file, model in final.items():
        peaks = recorder.recorded[file].peaks if file in recorder.recorded else {}
        quantize_activations(model, peaks, method)
    _replace(folder, [*final.values(), *others], index)
    calibration = Calibration(
        prompts=(request.prompts or PROMPTS) if text_conditions(manifests[0]) else (),
        samples=request.samples,
        budget=request.budget,
        error=error,
        sensitivity=sensitivity,
        kept=tuple(block for block in chosen if block in kept),
    )
    return entry.model_copy(update={"calibration": calibration})


class _Owner:
    """Which block a parameter is of."""

    def __init__(self, blocks: Mapping[str, Sequence[str]], method: Method) -> None:
        self._method = method
        self._modules = {f"{module}.": block for block, modules in blocks.items() for module in modules}

    def of(self, parameter: str) -> str:
        """The block's name; of the rest ``BESIDE``."""
        return next((block for module, block in self._modules.items() if parameter.startswith(module)), BESIDE)

    def in_graph(self, model: ir.Model) -> set[str]:
        """The blocks of which a graph has weights to quantize."""
        return {
            self.of(stored.parameter)
            for value in model.graph.initializers.values()
            if weight_form(value, self._method) is not None
            and value.const_value is not None
            and (stored := stored_parameter(value.const_value)) is not None
        }


def _covering(models: Mapping[str, ir.Model], owner: _Owner, macs: Mapping[str, int]) -> dict[str, str]:
    """For each block the graph that it is measured in: the largest that has it."""
    found: dict[str, str] = {}
    for file in sorted(models, key=lambda file: -macs[file]):
        for block in sorted(owner.in_graph(models[file])):
            found.setdefault(block, file)
    return found


def _record(pipeline: Pipeline, request: Request) -> None:
    """Run the loop of as many seeds as asked for, each with another condition."""
    manifest = pipeline.bundle.manifest
    labels = classes_of(manifest)
    for sample in range(request.samples):
        call: dict[str, Any] = {}
        if manifest.guidance and manifest.guidance_scale is None:
            call["guidance_scale"] = _SCALE
        if text_conditions(manifest):
            prompts = request.prompts or PROMPTS
            call["prompt"] = prompts[sample % len(prompts)]
        elif class_condition(manifest) is not None:
            call["class_labels"] = labels[sample * len(labels) // request.samples]
        pipeline(**call, seed=sample, output_type="latent")


class _Trial:
    """Graphs with some blocks in 8 bits, on the launches that were recorded in floats."""

    def __init__(
        self,
        stage: Path,
        folder: Path,
        index: WeightsIndex,
        made: Made,
        recorded: Mapping[str, Recorded],
        owner: _Owner,
        method: Method,
    ) -> None:
        self._method = method
        self._stage, self._folder, self._index = stage, folder, index
        self._made, self._recorded, self._owner = made, recorded, owner

    def error(self, file: str, stays: Callable[[str], bool]) -> float:
        """Of the output of a graph that is off most. stays: blocks in floats."""
        import onnx_ir as ir
        import onnxruntime

        recorded = self._recorded[file]
        model = _load(self._stage / file, self._index)
        quantize_weights([model], self._method, lambda parameter: stays(self._owner.of(parameter)), self._made)
        quantize_activations(model, recorded.peaks, self._method)
        path = self._folder / ".trial.onnx"
        ir.save(model, path)
        try:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = FATAL
            if MATRIX_TYPES[self._method] in UNFUSED:
                leave_pairs(options)
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        finally:
            path.unlink()
        errors = [0.0]
        for inputs, outputs in recorded.launches.values():
            found = session.run(list(outputs), inputs)
            errors += [relative_rms(one, wanted) for one, wanted in zip(found, outputs.values(), strict=True)]
        return max(errors)


def _within(
    sensitivity: Mapping[str, float], files: frozenset[str], trial: _Trial, budget: float
) -> tuple[frozenset[str], float]:
    """The blocks that stay as they are, those that lose most first, until the error is within the budget; and it."""
    order = sorted(sensitivity, key=lambda block: -sensitivity[block])
    measured: dict[int, float] = {}

    def error(count: int) -> float:
        """With so many blocks left out."""
        if count not in measured:
            measured[count] = max(trial.error(file, frozenset(order[:count]).__contains__) for file in files)
        return measured[count]

    # The more are left out, the smaller it is.
    few, many = 0, len(order)
    while few < many:
        middle = (few + many) // 2
        few, many = (few, middle) if error(middle) <= budget else (middle + 1, many)
    return frozenset(order[:many]), error(many)


def _load(path: Path, index: WeightsIndex) -> ir.Model:
    """A written graph whose weights say again which parameter they are."""
    import onnx_ir as ir

    model = ir.load(path)
    for name, value in model.graph.initializers.items():
        stored = index.tensors.get(name)
        if stored is not None and stored.parameter is not None and value.const_value is not None:
            known = StoredParameter(stored.parameter, stored.transposed, stored.equal, stored.rows, stored.quantized)
            note_parameter(value.const_value, known)
    return model


def _written(made: Made, folder: Path) -> Made:
    """The numbers and scales in a file beside the weights, where all trials find them; small ones in memory."""
    import onnx_ir as ir

    tensors = [tensor for pair in made.values() for tensor in pair]
    large = [tensor for tensor in tensors if tensor.nbytes > INLINE_BYTES]
    external = ir.external_data.convert_tensors_to_external(large, folder, _NUMBERS)
    stored: dict[str, ir.TensorProtocol] = {str(tensor.name): tensor for tensor in external}
    for tensor in tensors:
        name = str(tensor.name)
        if name not in stored:
            stored[name] = ir.tensor(tensor.numpy(), name=name)
        stored[name].meta.update(tensor.meta)
    return {key: (stored[str(numbers.name)], stored[str(scale.name)]) for key, (numbers, scale) in made.items()}


def _replace(folder: Path, models: Sequence[ir.Model], index: WeightsIndex) -> None:
    """Write graphs and weights in the place of those that are there; tables stay."""
    fresh = folder.with_name(f".{folder.name}.8bit")
    write_graphs(models, fresh, index.tabled)
    for path in fresh.iterdir():
        path.replace(folder / path.name)
    fresh.rmdir()
    (folder / _NUMBERS).unlink()

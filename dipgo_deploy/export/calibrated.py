"""Weights and activations in 8 bits: scales from the directory's own loop, blocks that lose most left out.

It works on a directory as it was written in floats: the loop runs, then the graphs are written anew.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dipgo_deploy.backends.onnxruntime_cuda import FATAL
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import Calibration, Manifest, QuantizationEntry
from dipgo_deploy.bundle.prologue import PROLOGUE_NAME
from dipgo_deploy.bundle.quantized import STEPS
from dipgo_deploy.bundle.weights import WeightsIndex
from dipgo_deploy.difference import relative_rms
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.quantized import Made, quantize_weights, weight_form
from dipgo_deploy.export.ranges import RangeRecorder, Recorded
from dipgo_deploy.export.stored import StoredParameter, note_parameter, stored_parameter
from dipgo_deploy.export.weights import INLINE_BYTES, write_graphs
from dipgo_deploy.runtime.given_pictures import picture_conditions
from dipgo_deploy.runtime.pipeline import Pipeline
from dipgo_deploy.runtime.requests import class_condition, classes_of, text_conditions

if TYPE_CHECKING:
    import onnx_ir as ir

METHOD: Literal["int8"] = "int8"
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
_PRODUCTS = ("MatMul", "Conv")


@dataclass(frozen=True)
class Request:
    """What is asked for. samples: runs that are recorded. prompts: of a text model, in turn; none: ``PROMPTS``.

    budget: the largest error of a launch, root mean square of the difference over that of the value.
    """

    samples: int = 4
    prompts: tuple[str, ...] = ()
    budget: float = BUDGET


def check_recordable(manifest: Manifest) -> None:
    """Refuse (UserError) what no loop can be recorded of here."""
    instead = "use --quantize int8-weights, which needs no recording"
    if manifest.dtype == "bf16":
        raise UserError(f"--quantize {METHOD}: bf16 graphs do not run on a CPU, where ranges are recorded; {instead}")
    if picture_conditions(manifest) or manifest.sampler.strength is not None:
        raise UserError(f"--quantize {METHOD}: the loop needs pictures, and none are here to record it with; {instead}")
    if text_conditions(manifest) and manifest.components.text_encoder is None:
        raise UserError(
            f"--quantize {METHOD}: without components there is no text to record the loop with; leave --no-components "
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
    owner = _Owner(blocks)
    index = WeightsIndex.load(folder)
    models = {file: _load(stage / file, index) for file in graphs}
    notify("recording ranges of activations")
    chosen = _covering(models, owner, {v.graph.file: v.macs for m in manifests for v in m.plan.variants})
    recorder = RangeRecorder({file: activations(model) for file, model in models.items()}, frozenset(chosen.values()))
    for manifest in manifests:
        _record(Pipeline(Bundle(stage, manifest), recorder, lazy=True), request)
    prologue = [path for path in (folder / f"{PROLOGUE_NAME}.onnx",) if path.is_file()]
    made: Made = {}
    every = [*models.values(), *(_load(path, index) for path in prologue)]
    quantize_weights(every, METHOD, made=made)
    made = _written(made, folder)
    notify(f"measuring {len(chosen)} blocks in 8 bits")
    trial = _Trial(stage, folder, index, made, recorder.recorded, owner)
    sensitivity = {block: trial.error(file, partial(operator.ne, block)) for block, file in chosen.items()}
    kept, error = _within(sensitivity, frozenset(chosen.values()), trial, request.budget)
    notify("writing the graphs in 8 bits")
    final = {file: _load(stage / file, index) for file in graphs}
    others = [_load(path, index) for path in prologue]
    entry = quantize_weights([*final.values(), *others], METHOD, lambda parameter: owner.of(parameter) in kept, made)
    for file, model in final.items():
        quantize_activations(model, recorder.recorded[file].peaks if file in recorder.recorded else {})
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

    def __init__(self, blocks: Mapping[str, Sequence[str]]) -> None:
        self._modules = {f"{module}.": block for block, modules in blocks.items() for module in modules}

    def of(self, parameter: str) -> str:
        """The block's name; of the rest ``BESIDE``."""
        return next((block for module, block in self._modules.items() if parameter.startswith(module)), BESIDE)

    def in_graph(self, model: ir.Model) -> set[str]:
        """The blocks of which a graph has weights to quantize."""
        return {
            self.of(stored.parameter)
            for value in model.graph.initializers.values()
            if weight_form(value, METHOD) is not None
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


def activations(model: ir.Model) -> tuple[str, ...]:
    """Names of the values that 8 bits are for: what products with quantized weights take, and what convolutions make.

    A convolution whose output several nodes read, or the graph gives, keeps floats, but for its weights.
    """
    names: list[str] = []
    for node in _products(model, in_floats=True):
        names += [str(value.name) for value in _of_product(node)]
    return tuple(dict.fromkeys(names))


def _products(model: ir.Model, *, in_floats: bool) -> list[ir.Node]:
    """Products with weights that are to be quantized (``in_floats``), or that are."""
    found = []
    for node in model.graph:
        if node.op_type not in _PRODUCTS or node.domain or node.inputs[1] is None:
            continue
        weight = node.inputs[1]
        maker = weight.producer()
        if in_floats:
            wanted = weight.is_initializer() and weight_form(weight, METHOD) is not None
        else:
            wanted = maker is not None and maker.op_type == "DequantizeLinear"
        if wanted and (node.op_type != "Conv" or _has_one_reader(node.outputs[0])):
            found.append(node)
    return found


def _has_one_reader(value: ir.Value) -> bool:
    """ONNX Runtime 1.31 makes 8-bit convolutions only of those whose rounded output has one."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def _of_product(node: ir.Node) -> list[ir.Value]:
    given = node.inputs[0]
    assert given is not None
    return [given, *(node.outputs if node.op_type == "Conv" else ())]


def quantize_activations(model: ir.Model, peaks: Mapping[str, float]) -> None:
    """Put a QuantizeLinear and a DequantizeLinear where products with quantized weights read and convolutions give.

    peaks: the largest absolute value of each. A product of which one is missing, never seen above 0 or not finite keeps
    floats. Scales are symmetrical, as TensorRT wants them.
    """
    graph = model.graph
    for node in _products(model, in_floats=False):
        values = _of_product(node)
        if not all(0 < peaks.get(str(value.name), 0.0) < math.inf for value in values):
            continue
        # Each product has a rounding of its own: of one that several share ONNX Runtime's fast kernels, which are for
        # uint8, cannot be made, and those for int8 are 70 times slower.
        node.replace_input_with(0, _rounded(graph, values[0], peaks, f"{node.name}/in", before=node))
        for made in values[1:]:
            users = list(made.uses())
            after = _rounded(graph, made, peaks, f"{node.name}/out")
            for user, place in users:
                user.replace_input_with(place, after)
        if node.op_type == "MatMul":
            _spread_bias(graph, node)


def _rounded(
    graph: ir.Graph, value: ir.Value, peaks: Mapping[str, float], name: str, before: ir.Node | None = None
) -> ir.Value:
    """A value after 8 bits. before: where its nodes go; None: behind what makes the value."""
    import onnx_ir as ir

    assert value.dtype is not None
    kind = value.dtype.numpy()
    exact = np.float32(peaks[str(value.name)] / STEPS["int8"])
    scale = np.maximum(np.array(exact).astype(kind), np.finfo(kind).tiny)
    given = []
    for suffix, array in (("scale", scale), ("zero", np.array(0, np.int8))):
        made = ir.Value(name=f"{name}_{suffix}", const_value=ir.tensor(array, name=f"{name}_{suffix}"))
        made.dtype, made.shape = made.const_value.dtype, ir.Shape([])
        graph.register_initializer(made)
        given.append(made)
    down = ir.node("QuantizeLinear", [value, *given], name=f"{name}/Quantize")
    up = ir.node("DequantizeLinear", [down.outputs[0], *given], name=f"{name}/Dequantize")
    for node, dtype in ((down, ir.DataType.INT8), (up, value.dtype)):
        made = node.outputs[0]
        made.name, made.dtype, made.shape = f"{node.name}:0", dtype, value.shape
    maker = value.producer()
    if before is not None:
        graph.insert_before(before, [down, up])
    else:
        assert maker is not None
        graph.insert_after(maker, [down, up])
    return up.outputs[0]


def _spread_bias(graph: ir.Graph, product: ir.Node) -> None:
    """Give the bias behind a product as many axes as the product has: with one axis ONNX Runtime 1.31 makes a Gemm of
    both, and has no 8-bit kernel for that."""
    import onnx_ir as ir

    made = product.outputs[0]
    users = list(made.uses())
    if len(users) != 1 or users[0][0].op_type != "Add" or made.shape is None:
        return
    add, place = users[0]
    bias = add.inputs[1 - place]
    if bias is None or not bias.is_initializer() or bias.shape is None or len(bias.shape) != 1:
        return
    axes = ir.Value(
        name=f"{product.name}/bias_axes", const_value=ir.tensor(np.arange(len(made.shape) - 1, dtype=np.int64))
    )
    axes.dtype, axes.shape = ir.DataType.INT64, ir.Shape([len(made.shape) - 1])
    graph.register_initializer(axes)
    node = ir.node("Unsqueeze", [bias, axes], name=f"{product.name}/SpreadBias")
    node.outputs[0].name, node.outputs[0].dtype = f"{product.name}/bias", bias.dtype
    node.outputs[0].shape = ir.Shape([1] * (len(made.shape) - 1) + [bias.shape[0]])
    graph.insert_before(add, node)
    add.replace_input_with(1 - place, node.outputs[0])


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
    ) -> None:
        self._stage, self._folder, self._index = stage, folder, index
        self._made, self._recorded, self._owner = made, recorded, owner

    def error(self, file: str, stays: Callable[[str], bool]) -> float:
        """Of the output of a graph that is off most. stays: blocks in floats."""
        import onnx_ir as ir
        import onnxruntime

        recorded = self._recorded[file]
        model = _load(self._stage / file, self._index)
        quantize_weights([model], METHOD, lambda parameter: stays(self._owner.of(parameter)), self._made)
        quantize_activations(model, recorded.peaks)
        path = self._folder / ".trial.onnx"
        ir.save(model, path)
        try:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = FATAL
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

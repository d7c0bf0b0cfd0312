"""Low-rank updates merged into the stored weights of an engine directory.

A merged weight is W + the sum of scale * alpha / rank * up @ down over its updates, in float32, rounded once.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dipgo_deploy.backends.storage import finite, from_storage, to_storage
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import Graph, TensorDType, TensorSpec
from dipgo_deploy.bundle.weights import WEIGHTS_NAME, StoredWeight, WeightsIndex, weights_of
from dipgo_deploy.errors import UserError
from dipgo_deploy.lora.file import Change, LoraChoice, LoraFile, check_scale, read_lora
from dipgo_deploy.lora.keys import Layer
from dipgo_deploy.lora.originals import kind_of_model, original_layer
from dipgo_deploy.lora.sgm import diffusers_module

# ONNX's names of types that can change -> the manifest's.
_DTYPES: Mapping[str, TensorDType] = {"float": "float32", "float16": "float16", "bfloat16": "bfloat16"}
# text encoders lost this level of their names in later versions of transformers
_OPTIONAL_LEVEL = "text_model_"
# A layer with its number, `encoder_layers_` `11` `_mlp_fc1` or T5's `encoder_block_` `0` `_layer_0_...`.
_NUMBERED = re.compile(r"(.*?(?:layers|block)_)(\d+)(_.*)")
KIND_OF_CLASS = {
    "FluxTransformer2DModel": "FLUX",
    "SD3Transformer2DModel": "Stable Diffusion 3",
    "UNet2DConditionModel": "a UNet",
    "UNet2DModel": "a UNet",
}
"""Class -> what its authors' own names for layers are those of; LoRA files may have them."""
# The weights of several text encoders are in one graph, which has the encoder in front of their names.
_ENCODER = re.compile(r"(text_encoder(?:_\d+)?)\.(.+)")


@dataclass(frozen=True)
class Coverage:
    """What became of a file's layers of one component.

    Attributes:
        applied: layers of which every change was made.
        not_applied: names of the others.
        not_computed: names of those that no output of this export depends on, such as the last layer of a text encoder
            of which an earlier one is read.
    """

    component: str
    applied: int
    not_applied: tuple[str, ...]
    not_computed: tuple[str, ...]

    @property
    def layers(self) -> int:
        """All of the file's layers of the component."""
        return self.applied + len(self.not_applied) + len(self.not_computed)


@dataclass(frozen=True)
class LoraReport:
    """What became of one LoRA file.

    Attributes:
        applied: layers that were changed, of all components.
        left_out: keys of changes that are not supported.
        denoiser: the one that it was applied to, of a model of several.
        graphs: changed tensors by graph; graphs that lack the layers have fewer, or none.
    """

    file: str
    scale: float
    applied: int
    components: tuple[Coverage, ...]
    left_out: tuple[str, ...]
    graphs: Mapping[str, int]
    denoiser: str = ""


@dataclass(frozen=True)
class _Rows:
    """Which rows of a change a parameter takes: ``count`` from ``first`` on, the two halves exchanged or not."""

    first: int
    count: int
    exchanged: bool = False

    def __getitem__(self, rows: slice) -> np.ndarray:
        numbers = np.arange(self.count)[rows]
        return self.first + ((numbers + self.count // 2) % self.count if self.exchanged else numbers)


@dataclass(frozen=True)
class _Target:
    """A stored tensor that a change is added to."""

    change: Change
    rows: _Rows
    folder: Path
    name: str


@dataclass(frozen=True)
class _Change:
    change: Change
    rows: _Rows
    scale: float


@dataclass(eq=False)  # compared and hashed by identity
class MergedWeights:
    """The changed weights of an engine directory, merged when they are asked for and then kept.

    identity: (sha256, scale) of each LoRA file, in order; behind the former @ and the denoiser, of a model of several.
    """

    identity: tuple[tuple[str, float], ...]
    reports: tuple[LoraReport, ...]
    _changes: Mapping[Path, Mapping[str, Sequence[_Change]]]
    _index: Mapping[Path, WeightsIndex]
    _merged: dict[tuple[Path, str], np.ndarray] = field(default_factory=dict)

    def identity_of(self, onnx_file: Path) -> tuple[tuple[str, float], ...]:
        """What changed the weights of a graph: ``identity``, or nothing where no weight of it is changed."""
        return self.identity if any(True for _ in self._names(onnx_file)) else ()

    def of(self, onnx_file: Path) -> dict[str, np.ndarray]:
        """The changed weights of one graph by initializer, in the graph's dtype and layout (bfloat16 as uint16).

        Graphs that share a weight get the same array.

        Raises:
            UserError: the weights file is cut short.
        """
        return {name: self._tensor(onnx_file.parent, name) for name in self._names(onnx_file)}

    @property
    def nbytes(self) -> int:
        """Host memory of what was merged so far."""
        return sum(array.nbytes for array in self._merged.values())

    def _names(self, onnx_file: Path) -> Iterator[str]:
        changes = self._changes.get(onnx_file.parent, {})
        there = weights_of(onnx_file, self._index[onnx_file.parent]) if changes else ()
        return (name for name in there if name in changes)

    def _tensor(self, folder: Path, name: str) -> np.ndarray:
        if (folder, name) not in self._merged:
            stored = self._index[folder].tensors[name]
            values = _read(folder / WEIGHTS_NAME, stored)
            weight = values.T if stored.transposed else values
            rows = slice(*(stored.rows or (None,))[:2])
            total = weight + sum(_delta(change, weight.shape, rows) for change in self._changes[folder][name])
            placed = total.T if stored.transposed else total
            with np.errstate(over="ignore"):  # which is looked for below
                placed = to_storage(placed, _DTYPES[stored.dtype])
            if not finite(placed, _DTYPES[stored.dtype]):
                raise UserError(
                    f"--lora: the weight {name} is too large for {stored.dtype} with the LoRA; take a smaller scale"
                )
            self._merged[folder, name] = placed
        return self._merged[folder, name]


def merge_loras(bundle: Bundle, choices: Sequence[LoraChoice]) -> MergedWeights:
    """Match LoRA files with the weights of an engine directory; nothing is merged yet.

    Several files add up. A scale of 0 changes nothing.

    Args:
        bundle: the engine directory.
        choices: the files, in order; what a partial one leaves out is in its report.

    Raises:
        UserError: a file that cannot be read or fits nothing here, values that are not finite, a shape that differs
            from the weight's, or an engine directory that does not say how it stores its weights. Of one that is not
            partial also: a component of which no layer fits, a layer that the model does not have, or a change of
            another kind than low-rank updates and differences.
    """
    loras = [(read_lora(choice.file), check_scale(choice.scale), choice) for choice in choices]
    of_denoiser = {denoiser: _Weights(bundle, denoiser) for denoiser in dict.fromkeys(one.denoiser for one in choices)}
    index = next(iter(of_denoiser.values())).index
    changes: dict[Path, dict[str, list[_Change]]] = {folder: defaultdict(list) for folder in index}
    reports, identity = [], []
    for lora, scale, choice in loras:
        weights = of_denoiser[choice.denoiser]
        targets, components = _match(lora, weights)
        _check_coverage(lora, components, weights, choice.partial)
        used: dict[Path, set[str]] = defaultdict(set)
        for change in {id(target.change): target.change for target in targets}.values():
            lora.check_values(change)
            if not abs(scale * change.factor) <= float(np.finfo(np.float32).max):
                raise UserError(f"{lora.path}: {change.layer.name}: scale times alpha / rank is no finite number")
        for target in targets:
            used[target.folder].add(target.name)
            if scale:
                changes[target.folder][target.name].append(_Change(target.change, target.rows, scale))
        if scale:
            identity.append((lora.sha256() + (f"@{weights.denoiser}" if weights.denoiser else ""), scale))
        reports.append(
            LoraReport(
                file=str(lora.path),
                scale=scale,
                applied=sum(coverage.applied for coverage in components),
                components=components,
                left_out=tuple(key for key, _ in lora.others),
                graphs=_count(bundle, used, index),
                denoiser=weights.denoiser,
            )
        )
    return MergedWeights(tuple(identity), tuple(reports), changes, index)


class _Weights:
    """The parameters of an engine directory, to be found by the names that LoRA files have for them.

    denoiser: of a model of several the one whose parameters are looked at, the first where it says nothing.
    """

    def __init__(self, bundle: Bundle, denoiser: str = "") -> None:
        self.path = bundle.path
        self.denoiser = _chosen(bundle.manifest.model.denoisers, denoiser)
        self.class_name = bundle.manifest.model.class_name
        layers = bundle.manifest.model.config.get("layers_per_block")
        self._layers_per_block = layers if isinstance(layers, int) else None
        folders = _folders(bundle)
        self.index = {folder: WeightsIndex.load(folder) for folder in folders.values()}
        # by component, path with underscores for dots, and weight or bias: every tensor that holds (part of) it
        self._tensors: dict[tuple[str, str, str], list[tuple[Path, str]]] = defaultdict(list)
        for graphs, folder in folders.items():
            for name, stored in self.index[folder].tensors.items():
                for parameter in (stored.parameter, *stored.equal):
                    module, _, kind = (parameter or "").rpartition(".")
                    if kind in ("weight", "bias") and self._is_looked_at(graphs, module):
                        component, path = self._owner(graphs, module)
                        self._tensors[component, path.replace(".", "_"), kind].append((folder, name))
        self._tabled = {
            (component, path.replace(".", "_"))
            for graphs, folder in folders.items()
            for parameter in self.index[folder].tabled
            for component, path in [self._owner(graphs, parameter.rpartition(".")[0])]
            if self._is_looked_at(graphs, parameter)
        }
        self.components = {component for component, _, _ in self._tensors}
        self._highest: dict[tuple[str, str, str], int] = {}
        for component, path, _ in self._tensors:
            if match := _NUMBERED.fullmatch(path):
                key = component, match[1], match[3]
                self._highest[key] = max(int(match[2]), self._highest.get(key, 0))

    def _is_looked_at(self, graphs: str, module: str) -> bool:
        """Not, if it is another denoiser's."""
        return graphs != "denoiser" or not self.denoiser or module.startswith(f"{self.denoiser}.")

    def _owner(self, graphs: str, module: str) -> tuple[str, str]:
        """The component that a module belongs to, and its path there."""
        if graphs == "denoiser" and self.denoiser:
            return graphs, module.removeprefix(f"{self.denoiser}.")
        encoder = _ENCODER.fullmatch(module) if graphs == "text_encoder" else None
        return (graphs, module) if encoder is None else (encoder[1], encoder[2])

    def component_of(self, layer: Layer) -> str:
        """What a layer is of: the first of its components that is here, else the first."""
        return next((name for name in layer.components if name in self.components), layer.components[0])

    def places(self, change: Change) -> list[tuple[_Rows, list[tuple[Path, str]]]] | None:
        """The parts of a change, each with the tensors that take it; None where a part has none.

        Raises:
            UserError: the parts together have another number of rows than the change.
        """
        component, module = self.component_of(change.layer), change.layer.module.replace(".", "_")
        for spelling in self._spellings(component, module):
            if tensors := self._tensors.get((component, spelling, change.parameter)):
                return [(_Rows(0, self._shape(tensors)[0]), tensors)]
        original = original_layer(module) if component == "denoiser" else None
        if original is None:
            return None
        parts, first = [], 0
        for path in original.modules:
            tensors = self._tensors.get((component, path.replace(".", "_"), change.parameter))
            if not tensors:
                return None
            shape = self._shape(tensors)
            exchanged = original.modulation and shape[0] == 2 * self._width(component, path)
            parts.append((_Rows(first, shape[0], exchanged), tensors))
            first += shape[0]
        return parts

    def unused(self, layer: Layer) -> bool:
        """Whether no output depends on a layer that is not here.

        That is a text encoder's projection, and a layer of it above the highest of the same path here.
        """
        component, module = self.component_of(layer), layer.module.replace(".", "_")
        if component != "denoiser" and module == "text_projection" and component in self.components:
            return True
        for spelling in self._spellings(component, module) if component != "denoiser" else ():
            match = _NUMBERED.fullmatch(spelling)
            if match is not None and int(match[2]) > self._highest.get((component, match[1], match[3]), math.inf):
                return True
        return False

    def tabled(self, module: str) -> bool:
        """Whether the weights of a layer of the denoiser became tables of timesteps, or a part of them."""
        path = module.replace(".", "_")
        original = original_layer(path)
        paths = [*self._spellings("denoiser", path), *(() if original is None else original.modules)]
        return any(("denoiser", path.replace(".", "_")) in self._tabled for path in paths)

    def stored(self, place: tuple[Path, str]) -> StoredWeight:
        """What the index says of a tensor."""
        return self.index[place[0]].tensors[place[1]]

    def _shape(self, places: Sequence[tuple[Path, str]]) -> tuple[int, ...]:
        return self.stored(places[0]).parameter_shape

    def _width(self, component: str, path: str) -> int:
        found = self._tensors.get((component, path.replace(".", "_"), "weight"))
        return self._shape(found)[1] if found else 0

    def _spellings(self, component: str, module: str) -> tuple[str, ...]:
        if component == "denoiser":
            sgm = self._layers_per_block and diffusers_module(module, self._layers_per_block)
            return (module, *((sgm,) if sgm else ()))
        return module, module.removeprefix(_OPTIONAL_LEVEL), f"{_OPTIONAL_LEVEL}{module}"


def _folders(bundle: Bundle) -> dict[str, Path]:
    """Folder of the graphs (and their weights) of denoiser and text encoders: what a LoRA file can change."""
    encoder = bundle.manifest.components.text_encoder
    folders = {"denoiser": (bundle.path / bundle.manifest.plan.variants[0].graph.file).parent}
    if encoder is not None:
        folders["text_encoder"] = (bundle.path / encoder.graph.file).parent
    return folders


def _count(bundle: Bundle, used: Mapping[Path, set[str]], index: Mapping[Path, WeightsIndex]) -> dict[str, int]:
    graphs: list[Graph] = [*bundle.manifest.plan.graphs]
    if bundle.manifest.components.text_encoder is not None:
        graphs.append(bundle.manifest.components.text_encoder.graph)
    files = {graph.file: bundle.path / graph.file for graph in graphs}
    return {
        name: len(used.get(file.parent, set()) & weights_of(file, index[file.parent]).keys())
        for name, file in files.items()
    }


def _match(lora: LoraFile, weights: _Weights) -> tuple[list[_Target], tuple[Coverage, ...]]:
    """What each change is added to, and what became of the layers of each component.

    Raises:
        UserError: a shape that differs from the weight's, or two layers of the file that change one weight.
    """
    targets: list[_Target] = []
    missing: set[Layer] = set()
    owners: dict[tuple[Path, str, type], Change] = {}
    for change in lora.changes:
        parts = weights.places(change)
        if parts is None:
            if not lora.is_zero(change):
                missing.add(change.layer)
            continue
        _check_shape(lora.path, change, [weights.stored(places[0]).parameter_shape for _, places in parts])
        for rows, places in parts:
            for folder, name in places:
                _check_stored(lora.path, change, name, weights.stored((folder, name)))
                other = owners.setdefault((folder, name, type(change)), change)
                if other is not change:
                    raise UserError(f"{lora.path}: {change.key} and {other.key} change the same weight; leave one out")
                targets.append(_Target(change, rows, folder, name))
    return targets, _coverage([target.change.layer for target in targets], missing, weights)


def _coverage(matched: Sequence[Layer], missing: set[Layer], weights: _Weights) -> tuple[Coverage, ...]:
    """Layers that fit nothing here and change nothing either, being zero, are in neither of the two."""
    by_component: dict[str, dict[str, dict[Layer, None]]] = defaultdict(lambda: defaultdict(dict))
    for layer in [*matched, *sorted(missing, key=lambda layer: layer.module)]:
        fate = "applied" if layer not in missing else "unused" if weights.unused(layer) else "missing"
        by_component[weights.component_of(layer)][fate][layer] = None
    return tuple(
        Coverage(
            component,
            len(fates["applied"]),
            tuple(layer.module for layer in fates["missing"]),
            tuple(layer.module for layer in fates["unused"]),
        )
        for component, fates in by_component.items()
    )


def _check_coverage(lora: LoraFile, components: Sequence[Coverage], weights: _Weights, partial: bool) -> None:
    """Refuse a file that is not applied as a whole, unless ``partial``; always one of which nothing is applied."""
    problems = []
    if lora.others:
        key, kind = lora.others[0]
        problems.append(f"{len(lora.others)} keys change the model in a way that is not supported ({kind}: {key})")
    for coverage in components:
        if coverage.component not in weights.components:
            problems.append(f"there is no {coverage.component} here for its {len(coverage.not_applied)} layers")
        elif tabled := [name for name in coverage.not_applied if weights.tabled(name)]:
            problems.append(
                f"{len(tabled)} of its {coverage.layers} layers of the {coverage.component} became tables of "
                f"timesteps at export (first: {tabled[0]}), which export with --no-timestep-tables, and without "
                "--class-labels, leaves out"
            )
        elif coverage.not_applied:
            share = f"{len(coverage.not_applied)} of its {coverage.layers}"
            first = coverage.not_applied[0]
            problems.append(f"{share} layers of the {coverage.component} are none of this model's (first: {first})")
        elif not coverage.applied:
            problems.append(f"no output here depends on any of its layers of the {coverage.component}")
    nothing = not any(coverage.applied for coverage in components)
    if nothing and not problems:
        problems.append("none of its layers is one of this model's")
    if not problems or (partial and not nothing):
        return
    model = _made_for(components)
    if model is not None and model != KIND_OF_CLASS.get(weights.class_name.partition("+")[0]):
        problems.append(f"it was made for another model: {model}, where this is {weights.class_name}")
    advice = "nothing of it can be applied" if nothing else "--lora-partial (partial=True) applies the rest"
    raise UserError(f"{lora.path}: in {weights.path}: {'; '.join(problems)}; {advice}")


def _made_for(components: Sequence[Coverage]) -> str | None:
    """The kind of model that a denoiser's layers are of, where none of them fits and their names tell."""
    for coverage in components:
        if coverage.component == "denoiser" and not coverage.applied:
            return next(filter(None, (kind_of_model(name.replace(".", "_")) for name in coverage.not_applied)), None)
    return None


def _chosen(known: Sequence[str], denoiser: str) -> str:
    """The denoiser that a LoRA is for; nothing where the model has one."""
    if denoiser and denoiser not in known:
        here = f"this model has {' and '.join(known)}" if known else "this model has one denoiser; leave it out"
        raise UserError(f"--lora {denoiser[:60]}=: {here}")
    return denoiser or next(iter(known), "")


def _check_shape(path: Path, change: Change, shapes: Sequence[tuple[int, ...]]) -> None:
    """Whether a change has the shape of the parameters that its rows are for, one after the other."""
    wide = change.shape
    shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    same = wide == shape or (
        len(wide) > 1 and len(shape) > 1 and wide[:2] == shape[:2] and set(wide[2:] + shape[2:]) <= {1}
    )
    if not same:
        raise UserError(
            f"{path}: {change.layer.name}: it changes a {change.parameter} of shape {wide}, the model's is {shape};"
            " it was made for another model"
        )


def _check_stored(path: Path, change: Change, name: str, stored: StoredWeight) -> None:
    if stored.equal:
        raise UserError(
            f"{path}: {change.layer.module}: its {change.parameter} is stored as one with {', '.join(stored.equal)},"
            " which has equal values; it cannot be changed alone"
        )
    if stored.quantized is not None:
        raise UserError(
            f"{path}: {change.layer.module}: its {change.parameter} is in {stored.dtype}, which no LoRA is added to; "
            "export without --quantize, or export a pipeline that has the LoRA in its weights (diffusers' fuse_lora)"
        )
    if stored.dtype not in _DTYPES:
        raise UserError(
            f"{path}: {change.layer.module}: its {change.parameter} {name} is {stored.dtype}; only floating-point ones"
            " change"
        )


def _delta(change: _Change, shape: tuple[int, ...], rows: slice) -> np.ndarray:
    """The update of these rows of a parameter, which have ``shape``."""
    factor = np.float32(change.scale * change.change.factor)
    result: np.ndarray = (factor * change.change.rows(change.rows[rows])).reshape(shape)
    return result


def _read(file: Path, stored: StoredWeight) -> np.ndarray:
    """A stored tensor as float32."""
    spec = TensorSpec(name="", shape=stored.shape, dtype=_DTYPES[stored.dtype])
    try:
        raw = np.fromfile(file, np.uint8, spec.nbytes, offset=stored.offset)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); export the engine directory again") from None
    if raw.size != spec.nbytes:
        raise UserError(f"{file}: shorter than its graphs say; export the engine directory again")
    return from_storage(raw, spec, copy=False).astype(np.float32, copy=False)

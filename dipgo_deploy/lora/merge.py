"""Low-rank updates merged into the stored weights of an engine directory.

A merged weight is W + the sum of scale * alpha / rank * up @ down over its updates, in float32, rounded once.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dipgo_deploy.backends.externals import external_tensors
from dipgo_deploy.backends.storage import to_storage
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.manifest import Graph
from dipgo_deploy.bundle.weights import StoredWeight, WeightsIndex
from dipgo_deploy.errors import UserError
from dipgo_deploy.lora.file import LoraFile, LowRank, check_scale, read_lora
from dipgo_deploy.lora.sgm import diffusers_module

_STORAGE = {"float": np.float32, "float16": np.float16, "bfloat16": np.uint16}
_SPEC_DTYPES = {"float": "float32", "float16": "float16", "bfloat16": "bfloat16"}
# text encoders lost this level of their names in later versions of transformers
_OPTIONAL_LEVEL = "text_model"
# The weights of several text encoders are in one graph, which has the encoder in front of their names.
_ENCODER = re.compile(r"(text_encoder(?:_\d+)?)\.(.+)")


@dataclass(frozen=True)
class LoraReport:
    """What became of one LoRA file.

    applied: layers that were changed. unmatched: modules of the file that no graph has a weight of. ignored: keys that
    are no LoRA weights. graphs: changed tensors by graph; graphs that lack the layers have fewer, or none.
    """

    file: str
    scale: float
    applied: int
    unmatched: tuple[str, ...]
    ignored: tuple[str, ...]
    graphs: Mapping[str, int]


@dataclass(frozen=True)
class _Change:
    update: LowRank
    scale: float


@dataclass(eq=False)  # compared and hashed by identity
class MergedWeights:
    """The changed weights of an engine directory, merged when they are asked for and then kept.

    identity: (sha256, scale) of each LoRA file, in order.
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
        return {name: self._tensor(onnx_file, name) for name in self._names(onnx_file)}

    @property
    def nbytes(self) -> int:
        """Host memory of what was merged so far."""
        return sum(array.nbytes for array in self._merged.values())

    def _names(self, onnx_file: Path) -> Iterator[str]:
        changes = self._changes.get(onnx_file.parent, {})
        return (
            (tensor.name for tensor in external_tensors(onnx_file) if tensor.name in changes) if changes else iter(())
        )

    def _tensor(self, onnx_file: Path, name: str) -> np.ndarray:
        folder = onnx_file.parent
        if (folder, name) not in self._merged:
            stored = self._index[folder].tensors[name]
            (tensor,) = (tensor for tensor in external_tensors(onnx_file) if tensor.name == name)
            values = _read(tensor.file, tensor.offset, stored)
            weight = values.T if stored.transposed else values
            rows = slice(*(stored.rows or (None,))[:2])
            total = weight + sum(_delta(change, weight.shape, rows) for change in self._changes[folder][name])
            placed = total.T if stored.transposed else total
            self._merged[folder, name] = to_storage(placed, _SPEC_DTYPES[stored.dtype])  # type: ignore[arg-type]
        return self._merged[folder, name]


def merge_loras(bundle: Bundle, choices: Sequence[tuple[Path, float]]) -> MergedWeights:
    """Match LoRA files with the weights of an engine directory; nothing is merged yet.

    Several files add up. A scale of 0 changes nothing. The updates of a file that fit no weight of any graph are
    skipped and reported.

    Args:
        bundle: the engine directory.
        choices: (file, scale), in order.

    Raises:
        UserError: a file that cannot be read or fits nothing here, a shape that differs from the weight's, or an
            engine directory that does not say how it stores its weights.
    """
    loras = [(read_lora(Path(path)), check_scale(scale)) for path, scale in choices]
    folders = _folders(bundle)
    layers = bundle.manifest.model.config.get("layers_per_block")
    index = {folder: WeightsIndex.load(folder) for folder in folders.values()}
    changes: dict[Path, dict[str, list[_Change]]] = {folder: defaultdict(list) for folder in index}
    reports, identity = [], []
    for lora, scale in loras:
        targets, unmatched = _match(lora, folders, index, layers if isinstance(layers, int) else None)
        if not targets:
            raise UserError(
                f"{lora.path}: none of its {len(lora.updates)} layers is in {bundle.path}"
                f" (first: {lora.updates[0].module}); it was made for another model"
            )
        used: dict[Path, set[str]] = defaultdict(set)
        for update, folder, name in targets:
            used[folder].add(name)
            if scale:
                changes[folder][name].append(_Change(update, scale))
        if scale:
            identity.append((lora.sha256, scale))
        reports.append(
            LoraReport(
                file=str(lora.path),
                scale=scale,
                applied=len(lora.updates) - len(unmatched),
                unmatched=unmatched,
                ignored=lora.ignored,
                graphs=_count(bundle, used),
            )
        )
    return MergedWeights(tuple(identity), tuple(reports), changes, index)


def _folders(bundle: Bundle) -> dict[str, Path]:
    """Folder of the graphs (and their weights) of denoiser and text encoders: what a LoRA file can change."""
    encoder = bundle.manifest.components.text_encoder
    folders = {"denoiser": (bundle.path / bundle.manifest.plan.variants[0].graph.file).parent}
    if encoder is not None:
        folders["text_encoder"] = (bundle.path / encoder.graph.file).parent
    return folders


def _count(bundle: Bundle, used: Mapping[Path, set[str]]) -> dict[str, int]:
    graphs: list[Graph] = [variant.graph for variant in bundle.manifest.plan.variants]
    if bundle.manifest.components.text_encoder is not None:
        graphs.append(bundle.manifest.components.text_encoder.graph)
    files = {graph.file: bundle.path / graph.file for graph in graphs}
    return {
        name: sum(tensor.name in used.get(file.parent, ()) for tensor in external_tensors(file))
        for name, file in files.items()
    }


def _match(
    lora: LoraFile, folders: Mapping[str, Path], index: Mapping[Path, WeightsIndex], layers_per_block: int | None
) -> tuple[list[tuple[LowRank, Path, str]], tuple[str, ...]]:
    """(update, folder, initializer) of each update that has a weight, and the modules of those that have none."""
    modules: dict[tuple[str, str, bool], list[tuple[Path, str]]] = defaultdict(list)
    for graphs, folder in folders.items():
        for name, stored in index[folder].tensors.items():
            for parameter in (stored.parameter, *stored.equal):
                module = (parameter or "").removesuffix(".weight")
                if parameter is not None and module != parameter:
                    component, path = _owner(graphs, module)
                    modules[component, path, False].append((folder, name))
                    modules[component, path.replace(".", "_"), True].append((folder, name))
    targets, unmatched = [], []
    for update in lora.updates:
        spellings = _spellings(update, layers_per_block)
        places = next(
            (found for module in spellings if (found := modules.get((update.component, module, update.flat)))), None
        )
        if places is None:
            unmatched.append(f"{update.component}: {update.module}")
            continue
        for folder, name in places:
            _check(lora.path, update, name, index[folder].tensors[name])
            targets.append((update, folder, name))
    return targets, tuple(unmatched)


def _owner(graphs: str, module: str) -> tuple[str, str]:
    """The component that a module belongs to, and its path there."""
    encoder = _ENCODER.fullmatch(module) if graphs == "text_encoder" else None
    return (graphs, module) if encoder is None else (encoder[1], encoder[2])


def _spellings(update: LowRank, layers_per_block: int | None) -> tuple[str, ...]:
    if update.component == "denoiser":
        sgm = layers_per_block and update.flat and diffusers_module(update.module, layers_per_block)
        return (update.module, *((sgm,) if sgm else ()))
    dot = "_" if update.flat else "."
    level = f"{_OPTIONAL_LEVEL}{dot}"
    return (update.module, update.module.removeprefix(level), f"{level}{update.module}")


def _check(path: Path, update: LowRank, name: str, stored: StoredWeight) -> None:
    if stored.equal:
        raise UserError(
            f"{path}: {update.module}: its weight is stored as one with {', '.join(stored.equal)}, which has equal"
            " values; it cannot be changed alone"
        )
    if stored.dtype not in _STORAGE:
        raise UserError(
            f"{path}: {update.module}: its weight {name} is {stored.dtype}; only floating-point ones change"
        )
    shape = stored.parameter_shape
    wide = (update.up.shape[0], *update.down.shape[1:])
    if wide != shape and not (wide[:2] == shape[:2] and set(wide[2:] + shape[2:]) <= {1}):
        raise UserError(
            f"{path}: {update.module}: it changes a weight of shape {wide}, the model's is {shape};"
            " it was made for another model"
        )


def _delta(change: _Change, shape: tuple[int, ...], rows: slice) -> np.ndarray:
    """The update of these rows of a weight, which have ``shape``."""
    update = change.update
    up = update.up.reshape(update.up.shape[:2])[rows]
    product = up @ update.down.reshape(update.down.shape[0], -1)
    result: np.ndarray = (np.float32(change.scale * update.factor) * product).reshape(shape)
    return result


def _read(file: Path, offset: int, stored: StoredWeight) -> np.ndarray:
    """A stored tensor as float32."""
    kind = _STORAGE[stored.dtype]
    count = int(np.prod(stored.shape))
    try:
        raw = np.fromfile(file, kind, count, offset=offset)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); export the engine directory again") from None
    if raw.size != count:
        raise UserError(f"{file}: shorter than its graphs say; export the engine directory again")
    values = (raw.astype(np.uint32) << 16).view(np.float32) if stored.dtype == "bfloat16" else raw.astype(np.float32)
    return values.reshape(stored.shape)

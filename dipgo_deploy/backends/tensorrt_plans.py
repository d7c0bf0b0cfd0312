"""Engines on disk: where they lie, and the key that says which graph, weights and options one was built from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pydantic

from dipgo_deploy.bundle.files import sha256_file
from dipgo_deploy.bundle.manifest import Graph
from dipgo_deploy.bundle.weights import ONNX_TYPES, WEIGHTS_NAME, weights_of
from dipgo_deploy.errors import UserError

PLANS = "plans"
PLAN_SUFFIX = ".plan"
RECORD_SUFFIX = ".json"
_LORA = ".lora-"
_CHUNK = 16 * 2**20


class _Frozen(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class BuildFlags(_Frozen):
    """Build options that change the engine.

    Attributes:
        workspace: bytes of scratch a tactic may use, None for the builder's default.
        opt_level: 0 to 5, None for the builder's default.
        max_aux_streams: streams that an engine may use beside its own.
        tf32: float32 products may be rounded to TF32.
        strip: the weights are left out and come from the graph's weights file when the engine is loaded.
        refit: other weights can be put in when the engine is loaded, which may cost speed.
        user_allocation: no memory is taken at run time but what the caller gives, where the builder knows the option
            (``Flavour.user_allocation``).
    """

    workspace: int | None = None
    opt_level: int | None = None
    max_aux_streams: int = 0
    version_compatible: bool = False
    hardware_compatible: bool = False
    strip: bool = False
    refit: bool = False
    tf32: bool = False
    user_allocation: bool = True


class GpuTarget(_Frozen):
    """What an engine is built for: one GPU (name and its capability), or GPU generations (no name; none: portable)."""

    gpu: str | None = None
    capabilities: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """For folder names: ``nvidia-l4-sm89``, ``sm80-sm86`` or ``portable``."""
        parts = [] if self.gpu is None else [re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-")]
        parts += ["sm" + capability.replace(".", "") for capability in self.capabilities]
        return "-".join(parts) or "portable"


class ShapeRange(_Frozen):
    """Smallest, usual and largest shape of an input."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


class KeyInputs(_Frozen):
    """Everything an engine depends on. graph, weights: sha256 of the ONNX file, and of the weights it uses.

    lora: sha256 and scale of each LoRA file merged into the weights.
    """

    graph: str
    weights: str
    profile: dict[str, ShapeRange]
    flags: BuildFlags
    backend: str
    version: str
    target: GpuTarget
    lora: tuple[tuple[str, float], ...] = ()

    @property
    def key(self) -> str:
        """sha256 over all of it."""
        return hashlib.sha256(_canonical(self.model_dump(mode="json"))).hexdigest()

    def differences(self, other: KeyInputs) -> list[str]:
        """Names of the fields that differ, in order; of flags the single ones."""
        found = []
        for name in type(self).model_fields:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine == theirs:
                continue
            if isinstance(mine, BuildFlags):
                found += [f for f in BuildFlags.model_fields if getattr(mine, f) != getattr(theirs, f)]
            else:
                found.append(name)
        return found


class PlanRecord(_Frozen):
    """The JSON file beside an engine: its key and what the key was made of, and the engine file's own sha256.

    weights_bytes: of the weights in the engine. seconds: of the build.
    """

    format_version: int = 1
    key: str
    inputs: KeyInputs
    plan_sha256: str
    plan_bytes: int
    weights_bytes: int
    seconds: float

    @classmethod
    def load(cls, path: Path) -> PlanRecord | None:
        """Read a record; None where there is none or it is not one (then the engine beside it is not used)."""
        try:
            record = cls.model_validate_json(path.read_bytes())
        except (OSError, ValueError):
            return None
        return record if record.format_version == 1 and record.key == record.inputs.key else None

    def intact(self, plan: Path) -> bool:
        """Whether the engine file is there with the recorded content."""
        return plan.is_file() and plan.stat().st_size == self.plan_bytes and sha256_file(plan) == self.plan_sha256


class WeightHashes:
    """sha256 of the weights that graphs use. Graphs share weights, so each range of a file is read once."""

    def __init__(self) -> None:
        self._ranges: dict[tuple[Path, int, int], str] = {}

    def digest(self, onnx_file: Path) -> tuple[str, int]:
        """sha256 over names, types, shapes and bytes of the external weights of an ONNX file, and their size in bytes.

        Only the bytes that this graph uses count, so a change elsewhere in a shared weights file does not show.

        Raises:
            UserError: the ONNX file, its weights or their index are missing or cut short.
        """
        total = hashlib.sha256()
        size = 0
        file = onnx_file.parent.resolve() / WEIGHTS_NAME
        for name, stored in weights_of(_existing(onnx_file)).items():
            content = self._range(file, stored.offset, stored.length)
            total.update(_canonical([name, ONNX_TYPES[stored.dtype], list(stored.shape), content]))
            size += stored.length
        return total.hexdigest(), size

    def _range(self, file: Path, offset: int, length: int) -> str:
        key = (file, offset, length)
        if key not in self._ranges:
            digest = hashlib.sha256()
            left = length
            with _existing(file).open("rb") as stream:
                stream.seek(offset)
                while left:
                    part = stream.read(min(left, _CHUNK))
                    if not part:
                        raise UserError(f"{file}: shorter than its graphs say; export the engine directory again")
                    digest.update(part)
                    left -= len(part)
            self._ranges[key] = digest.hexdigest()
        return self._ranges[key]


def plan_name(graph: Graph) -> str:
    """Name of a graph's engine: the variant's (``v03``) or the component's (``vae_decoder``)."""
    path = Path(graph.file)
    return path.parent.name if path.stem == "model" else path.stem


def profile_of(graph: Graph) -> dict[str, ShapeRange]:
    """The optimisation profile of a graph: each input at the smallest, usual and largest of its open sizes."""
    if graph.sizes is None:
        return {spec.name: ShapeRange(min=spec.shape, opt=spec.shape, max=spec.shape) for spec in graph.inputs}
    least, usual, most = graph.sizes.min, graph.sizes.opt, graph.sizes.max
    return {
        spec.name: ShapeRange(min=spec.at(least).shape, opt=spec.at(usual).shape, max=spec.at(most).shape)
        for spec in graph.inputs
    }


def plans_folder(engine_dir: Path, backend: str, version: str, target: GpuTarget) -> Path:
    """Where engines of a backend's version for a target lie."""
    return engine_dir / PLANS / f"{backend}-{version}-{target.label}"


def stored_plans(engine_dir: Path, backend: str, name: str) -> list[tuple[Path, PlanRecord]]:
    """Engine files of that name with their records, of any version, target and LoRA of the backend, in order."""
    found = []
    for folder in sorted((engine_dir / PLANS).glob(f"{backend}-*")):
        for path in [folder / f"{name}{RECORD_SUFFIX}", *sorted(folder.glob(f"{name}{_LORA}*{RECORD_SUFFIX}"))]:
            record = PlanRecord.load(path)
            if record is not None and record.inputs.backend == backend:
                found.append((path.with_suffix(PLAN_SUFFIX), record))
    return found


def plan_file(name: str, lora: Sequence[tuple[str, float]]) -> str:
    """File name of a graph's engine; engines with LoRA weights lie beside those without."""
    return f"{name}{_LORA}{lora_label(lora)}{PLAN_SUFFIX}" if lora else f"{name}{PLAN_SUFFIX}"


def graph_of_plan(path: Path) -> str:
    """The name of the graph (``plan_name``) that an engine file, or its record, is of."""
    return path.name.removesuffix(path.suffix).partition(_LORA)[0]


def lora_label(identity: Sequence[tuple[str, float]]) -> str:
    """Short name of LoRA files (sha256) and their scales, for file names."""
    return hashlib.sha256(_canonical([list(part) for part in identity])).hexdigest()[:12]


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: named in the manifest but missing; export the engine directory again")
    return path


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()

"""A hand-made engine directory with a toy denoiser, and the same loop in numpy.

The denoiser, per half of the batch (G halves): ``a = tanh(wa * latent + e)``, prediction ``sin(wb * a + t) + latent/8``
and guidance over the halves, where e comes from the condition. Its variants: ``full`` computes a and stores it;
``cached`` reads it; ``mixed`` reads the old a, uses and stores ``a + old / 2`` (a read and a write of one cache in one
launch: ping-pong); ``refresh`` only stores a.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto as TP
from onnx import helper as oh
from onnx import numpy_helper

from dipgo_deploy.bundle.files import hash_tree, sha256_file
from dipgo_deploy.bundle.manifest import (
    MANIFEST_NAME,
    Components,
    ConditionSpec,
    Graph,
    LatentSpec,
    LaunchEntry,
    Manifest,
    ModelEntry,
    PlanEntry,
    SamplerEntry,
    TensorSpec,
    TextEncoderEntry,
    TokenizerEntry,
    VariantEntry,
)
from dipgo_deploy.bundle.weights import WEIGHTS_INDEX, StoredWeight, WeightsIndex

C, H, W = 4, 8, 8
LENGTH, WIDTH, VOCABULARY = 6, 5, 12
CLASSES = {"boot": 0, "bag": 1, "coat": 2}
NULL_CLASS = 3
WORDS = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "a", "boot", "bag", "coat", "red", "blue", "small", "big"]
_ONNX = {"float32": TP.FLOAT, "float16": TP.FLOAT16, "int64": TP.INT64}
# name: reads a cache, writes a cache, predicts
VARIANTS = {
    "full": (False, True, True),
    "cached": (True, False, True),
    "mixed": (True, True, True),
    "refresh": (False, True, False),
}
ROUTE = (
    ("full", None, 0),
    ("cached", 0, None),
    ("mixed", 0, 1),
    ("mixed", 1, 0),
    ("refresh", None, 1),
    ("cached", 1, None),
)


@dataclass(frozen=True)
class Toy:
    """What to build: ``kind`` of condition (text, class or none), guidance, batch, cache dtype, sampler noises."""

    kind: str = "text"
    guidance: bool = True
    batch: int = 2
    dtype: str = "fp32"
    noises: int = 1
    vae: bool = True
    text_encoder: bool = True
    guidance_scale: float | None = 3.0
    control: bool = False  # e depends on the mean of a picture, too

    @property
    def model_dtype(self) -> str:
        return {"fp32": "float32", "fp16": "float16", "bf16": "float32"}[self.dtype]

    @property
    def halves(self) -> int:
        return 2 if self.guidance else 1

    @property
    def slots(self) -> int:
        return 1 + sum(VARIANTS[name][2] for name, _, _ in ROUTE) + self.noises


def weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    return {
        "wa": random.uniform(0.5, 1.5, (1, C, H, W)).astype(np.float32),
        "wb": random.uniform(0.5, 1.5, (1, C, H, W)).astype(np.float32),
        "tokens": random.normal(size=(VOCABULARY, WIDTH)).astype(np.float32),
        "classes": random.normal(size=(NULL_CLASS + 1,)).astype(np.float32),
    }


def build(folder: Path, toy: Toy) -> Path:
    """Write the engine directory; returns ``folder``."""
    for name in ("graphs", "components/text_encoder", "components/vae", "tokenizer"):
        (folder / name).mkdir(parents=True)
    manifest = manifest_of(toy)
    external = _write_weights(folder / "graphs/weights.bin")
    for component in ("text_encoder", "vae"):
        _write_index(folder / "components" / component, {})
    for variant in manifest.plan.variants:
        _save(folder, variant.graph, _denoiser_nodes(toy, variant.name), external)
    table = weights()["tokens"]
    if manifest.components.text_encoder is not None:
        nodes = [oh.make_node("Gather", ["table", "ids"], ["encoder_hidden_states"])]
        _save(folder, manifest.components.text_encoder.graph, nodes, [numpy_helper.from_array(table, "table")])
        _write_tokenizer(folder / "tokenizer/tokenizer.json")
    if manifest.components.vae_decoder is not None:
        _save(folder, manifest.components.vae_decoder, _vae_nodes(), [_constant("three", np.array([0, 1, 2]))])
    (folder / MANIFEST_NAME).write_text(replace_manifest(manifest, files=hash_tree(folder)).dumps())
    return folder


def build_several(folder: Path, toy: Toy) -> Path:
    """Write the engine directory with two schedules: "whole", and "short" without the launch that only stores."""
    build(folder, toy)
    manifest, plan = Manifest.load(folder), manifest_of(toy).plan
    launches = tuple(launch for launch in plan.launches if launch.slot is not None)
    variants = tuple(variant for variant in plan.variants if variant.predicts)  # those without are the last
    short = {**plan.model_dump(), "launches": launches, "variants": variants}
    other = "schedules/short/manifest.json"
    (folder / other).parent.mkdir(parents=True)
    (folder / other).write_text(replace_manifest(manifest, name="short", plan=short).dumps())
    files = {**manifest.files, other: sha256_file(folder / other)}
    (folder / MANIFEST_NAME).write_text(
        replace_manifest(manifest, name="whole", others={"short": other}, files=files).dumps()
    )
    return folder


def replace_manifest(manifest: Manifest, **changes: Any) -> Manifest:
    return Manifest.model_validate({**manifest.model_dump(), **changes})


def manifest_of(toy: Toy) -> Manifest:
    components = Components(
        text_encoder=TextEncoderEntry(
            graph=Graph(
                file="components/text_encoder/model.onnx",
                inputs=(TensorSpec(name="ids", shape=(1, LENGTH), dtype="int64"),),
                outputs=(TensorSpec(name="encoder_hidden_states", shape=(1, LENGTH, WIDTH), dtype="float32"),),
            ),
            tokenizers=(TokenizerEntry(file="tokenizer/tokenizer.json", length=LENGTH, pad_id=0, ids="ids"),),
        )
        if toy.kind == "text" and toy.text_encoder
        else None,
        vae_decoder=Graph(
            file="components/vae/model.onnx",
            inputs=(TensorSpec(name="latents", shape=(toy.batch, C, H, W), dtype="float32"),),
            outputs=(TensorSpec(name="images", shape=(toy.batch, H, W, 3), dtype="float32"),),
        )
        if toy.vae
        else None,
        class_labels=CLASSES if toy.kind == "class" else None,
        null_class=NULL_CLASS if toy.kind == "class" else None,
    )
    return Manifest(
        created_by="test",
        model=ModelEntry(class_name="Toy", name="toy", config_hash="0", granularity="block", config={}),
        sampler=SamplerEntry(class_name="Toy", config={}, num_inference_steps=len(ROUTE)),
        dtype=toy.dtype,
        batch=toy.batch,
        guidance=toy.guidance,
        guidance_scale=toy.guidance_scale if toy.guidance else None,
        latent=LatentSpec(channels=C, height=H, width=W),
        conditions=_conditions(toy),
        plan=_plan(toy),
        components=components,
        tools={},
        files={},
    )


def _conditions(toy: Toy) -> tuple[ConditionSpec, ...]:
    rows = toy.halves * toy.batch
    found: list[ConditionSpec] = []
    if toy.kind == "text":
        shape = (rows, LENGTH, WIDTH)
        found.append(ConditionSpec(name="encoder_hidden_states", shape=shape, dtype=toy.model_dtype, source="text"))
    if toy.kind == "class":
        found.append(ConditionSpec(name="class_labels", shape=(rows,), dtype="int64", source="class"))
    if toy.control:
        found.append(ConditionSpec(name="control", shape=(rows, 3, H, W), dtype=toy.model_dtype, source="image"))
    return tuple(found)


def _plan(toy: Toy) -> PlanEntry:
    cache = TensorSpec(name="", shape=(toy.halves * toy.batch, C, H, W), dtype=toy.model_dtype)
    offsets = (0, -(-cache.nbytes // 256) * 256)
    variants = {name: _variant(toy, name) for name in VARIANTS}
    random = np.random.default_rng(9)
    launches: list[LaunchEntry] = []
    predictions = 0
    for step, (name, read, write) in enumerate(ROUTE):
        row = np.zeros(toy.slots)
        row[: 1 + predictions] = random.uniform(-0.7, 0.7, 1 + predictions)
        if toy.noises and step > 2:
            row[-1] = 0.3
        predicts = VARIANTS[name][2]
        launches.append(
            LaunchEntry(
                step=step,
                variant=list(VARIANTS).index(name),
                timestep=10.0 - step,
                coefficients=tuple(row),
                reads=() if read is None else (offsets[read],),
                writes=() if write is None else (offsets[write],),
                slot=1 + predictions if predicts else None,
            )
        )
        predictions += predicts
    return PlanEntry(
        variants=tuple(variants.values()),
        launches=tuple(launches),
        final=tuple(random.uniform(-1, 1, toy.slots)),
        slots=toy.slots,
        noises=toy.noises,
        arena_bytes=2 * offsets[1],
        lower_bound_bytes=2 * offsets[1],
        macs_full=1,
        macs_schedule=1,
        macs_run=1,
        evaluations=len(ROUTE),
    )


def _variant(toy: Toy, name: str) -> VariantEntry:
    reads, writes, predicts = VARIANTS[name]
    cache = {"shape": (toy.halves * toy.batch, C, H, W), "dtype": toy.model_dtype}
    inputs = [
        TensorSpec(name="stack", shape=(toy.slots, toy.batch, C, H, W), dtype="float32"),
        TensorSpec(name="coefficients", shape=(toy.slots,), dtype="float32"),
    ]
    if predicts:  # a refresh needs neither the time nor the guidance scale
        inputs.append(TensorSpec(name="timestep", shape=(1,), dtype="float32"))
        if toy.guidance:
            inputs.append(TensorSpec(name="guidance_scale", shape=(1,), dtype="float32"))
    if name != "cached":
        inputs.extend(_conditions(toy))
    if reads:
        inputs.append(TensorSpec(name="cache.a/out0", **cache))
    outputs = []
    if predicts:
        outputs.append(TensorSpec(name="noise_pred", shape=(toy.batch, C, H, W), dtype="float32"))
    if writes:
        outputs.append(TensorSpec(name="new_cache.a/out0", **cache))
    return VariantEntry(
        name=name,
        graph=Graph(file=f"graphs/{name}.onnx", inputs=tuple(inputs), outputs=tuple(outputs)),
        reads=("cache.a/out0",) if reads else (),
        writes=("new_cache.a/out0",) if writes else (),
        predicts=predicts,
        macs=1,
    )


def _denoiser_nodes(toy: Toy, name: str) -> list[onnx.NodeProto]:
    reads, writes, predicts = VARIANTS[name]
    n = oh.make_node
    nodes = [
        n("Constant", [], ["flat_shape"], value_ints=[toy.slots, -1]),
        n("Constant", [], ["shape"], value_ints=[toy.batch, C, H, W]),
        n("Constant", [], ["ones"], value_ints=[-1, 1, 1, 1]),
        n("Constant", [], ["half"], value_float=0.5),
        n("Constant", [], ["eighth"], value_float=0.125),
        n("Reshape", ["stack", "flat_shape"], ["flat"]),
        n("Constant", [], ["written"], value_ints=[1, toy.slots - 1 - toy.noises, toy.noises]),
        n("Split", ["flat", "written"], ["first", "predictions", "noises"], axis=0),
        n("Constant", [], ["before"], value_ints=[toy.slots - 1 - toy.noises, 1 + toy.noises]),
        n("Split", ["flat", "before"], ["earlier", "unused"], axis=0),
        n("Sub", ["predictions", "earlier"], ["differences"]),
        n("Concat", ["first", "differences", "noises"], ["terms"], axis=0),
        n("MatMul", ["coefficients", "terms"], ["sum"]),
        n("Reshape", ["sum", "shape"], ["latent"]),
        n("Concat", ["latent"] * toy.halves, ["x"], axis=0),
    ]
    if name != "cached":
        nodes.append(n("Mul", ["x", "wa"], ["scaled"]))
        if toy.kind == "text":
            nodes += [
                n("Constant", [], ["rows"], value_ints=[toy.halves * toy.batch, LENGTH * WIDTH, 1, 1]),
                n("Constant", [], ["axis"], value_ints=[1]),
                n("Cast", ["encoder_hidden_states"], ["states"], to=TP.FLOAT),
                n("Reshape", ["states", "rows"], ["state_rows"]),
                n("ReduceMean", ["state_rows", "axis"], ["e"], keepdims=1),
            ]
        elif toy.kind == "class":
            nodes += [n("Gather", ["classes", "class_labels"], ["picked"]), n("Reshape", ["picked", "ones"], ["e"])]
        else:
            nodes.append(n("Constant", [], ["e"], value_float=0.0))
        if toy.control:
            nodes += [
                n("Constant", [], ["pixels"], value_ints=[1, 2, 3]),
                n("Cast", ["control"], ["shown"], to=TP.FLOAT),
                n("ReduceMean", ["shown", "pixels"], ["grey"], keepdims=1),
                n("Add", ["e", "grey"], ["both_e"]),
            ]
        e = "both_e" if toy.control else "e"
        nodes += [n("Add", ["scaled", e], ["biased"]), n("Tanh", ["biased"], ["computed"])]
    if reads:
        nodes.append(n("Cast", ["cache.a/out0"], ["old"], to=TP.FLOAT))
    if name == "mixed":
        nodes += [n("Mul", ["old", "half"], ["faded"]), n("Add", ["computed", "faded"], ["a"])]
    else:
        nodes.append(n("Identity", ["old" if name == "cached" else "computed"], ["a"]))
    if predicts:
        nodes += [
            n("Mul", ["a", "wb"], ["wide"]),
            n("Add", ["wide", "timestep"], ["phase"]),
            n("Sin", ["phase"], ["wave"]),
            n("Mul", ["x", "eighth"], ["rest"]),
            n("Add", ["wave", "rest"], ["both"]),
        ]
        if toy.guidance:
            nodes += [
                n("Split", ["both"], ["without", "with"], axis=0, num_outputs=2),
                n("Sub", ["with", "without"], ["direction"]),
                n("Mul", ["direction", "guidance_scale"], ["guided"]),
                n("Add", ["without", "guided"], ["noise_pred"]),
            ]
        else:
            nodes.append(n("Identity", ["both"], ["noise_pred"]))
    if writes:
        nodes.append(n("Cast", ["a"], ["new_cache.a/out0"], to=_ONNX[toy.model_dtype]))
    return nodes


def _vae_nodes() -> list[onnx.NodeProto]:
    return [
        oh.make_node("Gather", ["latents", "three"], ["colours"], axis=1),
        oh.make_node("Sigmoid", ["colours"], ["bounded"]),
        oh.make_node("Transpose", ["bounded"], ["images"], perm=[0, 2, 3, 1]),
    ]


def _constant(name: str, array: np.ndarray) -> onnx.TensorProto:
    return numpy_helper.from_array(array.astype(np.int64), name)


def _write_weights(path: Path) -> list[onnx.TensorProto]:
    """All weights in one file at page boundaries, as external tensors."""
    tensors, stored = [], {}
    with path.open("wb") as file:
        for name, array in weights().items():
            if name == "tokens":
                continue
            file.write(b"\0" * (-file.tell() % 4096))
            tensor = numpy_helper.from_array(array, name)
            onnx.external_data_helper.set_external_data(tensor, path.name, offset=file.tell(), length=array.nbytes)
            file.write(tensor.raw_data)
            tensor.ClearField("raw_data")
            stored[name] = StoredWeight(
                parameter=None, shape=array.shape, dtype="float", offset=file.tell() - array.nbytes, length=array.nbytes
            )
            tensors.append(tensor)
    _write_index(path.parent, stored)
    return tensors


def _write_index(folder: Path, stored: dict[str, StoredWeight]) -> None:
    (folder / WEIGHTS_INDEX).write_text(WeightsIndex(tensors=stored).model_dump_json())


def _save(folder: Path, graph: Graph, nodes: list[onnx.NodeProto], initializers: list[onnx.TensorProto]) -> None:
    def values(specs: tuple[TensorSpec, ...]) -> list[onnx.ValueInfoProto]:
        return [oh.make_tensor_value_info(spec.name, _ONNX[spec.dtype], spec.shape) for spec in specs]

    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in initializers if tensor.name in used]
    proto = oh.make_graph(nodes, "toy", values(graph.inputs), values(graph.outputs), kept)
    model = oh.make_model(proto, opset_imports=[oh.make_opsetid("", 20)], ir_version=10)
    (folder / graph.file).write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(folder / graph.file), full_check=True)


def _write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
    )
    tokenizer.save(str(path))


def token_ids(prompt: str) -> list[int]:
    """What the tokenizer must give: begin, words, end, padding; a long prompt loses words, not its end."""
    words = [WORDS.index(word) if word in WORDS else 3 for word in prompt.split()][: LENGTH - 2]
    ids = [1, *words, 2]
    return ids + [0] * (LENGTH - len(ids))


def embed(prompt: str) -> np.ndarray:
    """Embeddings (1, LENGTH, WIDTH) float32."""
    return weights()["tokens"][token_ids(prompt)][None]


def reference(
    toy: Toy, noise: np.ndarray, noises: np.ndarray | None, condition: np.ndarray | None, scale: float
) -> np.ndarray:
    """The loop in numpy float64: ``condition`` (G*B, ...) embeddings or class ids. Returns (B, C, h, w)."""
    plan = manifest_of(toy).plan
    w = {name: array.astype(np.float64) for name, array in weights().items()}
    stack = np.zeros((toy.slots, toy.batch, C, H, W))
    stack[0] = noise
    if noises is not None and toy.noises:
        stack[-toy.noises :] = noises
    if condition is None:
        e = np.zeros((1, 1, 1, 1))
    elif toy.kind == "text":
        e = condition.astype(np.float64).mean(axis=(1, 2)).reshape(-1, 1, 1, 1)
    else:
        e = w["classes"][condition].reshape(-1, 1, 1, 1)
    a = np.zeros(())
    for launch, (name, _, _) in zip(plan.launches, ROUTE, strict=True):
        latent = np.tensordot(np.array(launch.coefficients), stack, axes=1)
        x = np.concatenate([latent] * toy.halves)
        computed = np.tanh(w["wa"] * x + e)
        a = {"full": computed, "cached": a, "mixed": computed + a / 2, "refresh": computed}[name]
        if launch.slot is not None:
            both = np.sin(w["wb"] * a + launch.timestep) + x / 8
            if toy.guidance:
                without, with_ = np.split(both, 2)
                both = without + scale * (with_ - without)
            stack[launch.slot] = both
    return np.tensordot(np.array(plan.final), stack, axes=1)

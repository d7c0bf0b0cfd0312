"""Defects to plant in engine directories and in the package, each with what the comparison has to say of it first."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

Edit = Callable[[dict[str, Any]], None]
Change = Callable[[Path], None]
Patch = Callable[[Any], None]


@dataclass(frozen=True)
class Defect:
    """name: what is wrong. engine: ``text`` (SDXL in small), ``classes`` (DiT) or ``segments``. One of the three: edit
    of the manifest (its JSON), change of files in a copy, patch of the package with pytest's monkeypatch. says: regular
    expression of the first failure. quick: also run where time is short. pictures: shows in pictures only.
    """

    name: str
    engine: str
    says: str
    edit: Edit | None = None
    change: Change | None = None
    patch: Patch | None = None
    quick: bool = False
    pictures: bool = False


# --- manifests


def _launch(index: int, field: str, value: Callable[[Any, dict[str, Any]], Any]) -> Edit:
    def edit(manifest: dict[str, Any]) -> None:
        launches = manifest["plan"]["launches"]
        launches[index][field] = value(launches[index][field], manifest)

    return edit


def _coefficient(number: int, slot: int, change: Callable[[float], float]) -> Edit:
    """Of the launch of this number among those that have coefficients."""

    def edit(manifest: dict[str, Any]) -> None:
        rows = [launch["coefficients"] for launch in manifest["plan"]["launches"] if launch["coefficients"]]
        rows[number][slot] = change(rows[number][slot])

    return edit


def _set(path: str, value: Any) -> Edit:
    def edit(manifest: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        at: Any = manifest
        for name in parents:
            at = at[int(name)] if isinstance(at, list) else at[name]
        at[int(last) if isinstance(at, list) else last] = value(at) if callable(value) else value

    return edit


def _swap(field: str, one: int, other: int) -> Edit:
    def edit(manifest: dict[str, Any]) -> None:
        launches = [launch for launch in manifest["plan"]["launches"] if launch[field] not in ([], None)]
        launches[one][field], launches[other][field] = launches[other][field], launches[one][field]

    return edit


def _first_with(manifest: dict[str, Any], field: str, count: int = 1) -> dict[str, Any]:
    found: dict[str, Any] = next(launch for launch in manifest["plan"]["launches"] if len(set(launch[field])) >= count)
    return found


def _reads(change: Callable[[list[int]], list[int]], count: int = 1) -> Edit:
    def edit(manifest: dict[str, Any]) -> None:
        launch = _first_with(manifest, "reads", count)
        launch["reads"] = change(launch["reads"])

    return edit


def _writes(change: Callable[[list[int]], list[int]], count: int = 1) -> Edit:
    def edit(manifest: dict[str, Any]) -> None:
        launch = _first_with(manifest, "writes", count)
        launch["writes"] = change(launch["writes"])

    return edit


def _beyond(manifest: dict[str, Any]) -> None:
    """A read of memory that nobody writes."""
    launch = _first_with(manifest, "reads")
    launch["reads"] = [manifest["plan"]["arena_bytes"], *launch["reads"][1:]]
    manifest["plan"]["arena_bytes"] += 2**20


def _without(index: int) -> Edit:
    def edit(manifest: dict[str, Any]) -> None:
        del manifest["plan"]["launches"][index]

    return edit


def _exchanged(path: str, one: int, other: int) -> Edit:
    def edit(manifest: dict[str, Any]) -> None:
        at: Any = manifest
        for name in path.split("/"):
            at = at[int(name)] if isinstance(at, list) else at[name]
        at[one], at[other] = at[other], at[one]

    return edit


def _variant(index: int, to: int) -> Edit:
    return _launch(index, "variant", lambda *_: to)


LIST, LOOP = "launch list, ", "loop, evaluation "
_ROW = r"launch list, launch {} \(evaluation \d+, variant \S+\), {}: error "

MANIFESTS = (
    *(
        Defect(
            f"{engine}: coefficient {slot} of launch {launch} {what}",
            engine,
            _ROW.format(r"\d+", "coefficients"),
            _coefficient(launch, slot, change),
            quick=launch == 1,
        )
        for engine in ("text", "classes")
        for launch, slot, what, change in (
            (1, 0, "times 1.01", lambda value: value * 1.01),
            (2, 1, "with the other sign", lambda value: -value),
            (3, 0, "zero", lambda value: 0.0),
            (2, 0, "off by 1e-9", lambda value: value + 1e-9),
        )
    ),
    Defect(
        "coefficient of noise lost", "text", _ROW.format(r"\d+", "coefficients"), _coefficient(2, -1, lambda v: v + 0.1)
    ),
    Defect(
        "segment's coefficient",
        "segments",
        r"launch list, launch \d+ \(evaluation \d+",
        _set(
            "plan/launches",
            lambda plan: [
                {**launch, "coefficients": [value * 1.001 for value in launch["coefficients"]]}
                for launch in plan["launches"]
            ],
        ),
        quick=True,
    ),
    Defect("rows of two launches exchanged", "text", _ROW.format(r"\d+", "coefficients"), _swap("coefficients", 1, 2)),
    Defect(
        "timesteps of two launches exchanged", "text", _ROW.format(1, "timestep"), _swap("timestep", 1, 2), quick=True
    ),
    Defect("timestep one too high", "classes", _ROW.format(2, "timestep"), _launch(2, "timestep", lambda t, _: t + 1)),
    Defect(
        "timestep of the first launch zero",
        "segments",
        _ROW.format(0, "timestep"),
        _launch(0, "timestep", lambda *_: 0.0),
    ),
    Defect(
        "final weight times 1.01",
        "text",
        "launch list, after the last launch, final: ",
        _set("plan/final/0", lambda f: f[0] * 1.01),
        quick=True,
    ),
    Defect(
        "final weights exchanged",
        "classes",
        "launch list, after the last launch, final: ",
        _exchanged("plan/final", 0, 1),
    ),
    Defect(
        "final weight of the last prediction lost",
        "segments",
        "launch list, after the last launch, final: ",
        _set("plan/final/-1", 0.0),
    ),
    Defect("slots of two predictions exchanged", "classes", LIST, _swap("slot", 1, 2), quick=True),
    Defect(
        "slot of a prediction repeated",
        "classes",
        r"launch list, launch 2 .*: slot \d+ of \d+ is not for a prediction, or is filled already",
        _launch(2, "slot", lambda _, m: m["plan"]["launches"][1]["slot"]),
    ),
    Defect(
        "a launch left out", "text", r"launch list: no launch makes the prediction of slot \d+", _without(2), quick=True
    ),
    Defect(
        "the last launch left out", "classes", r"launch list: no launch makes the prediction of slot \d+", _without(-1)
    ),
    Defect(
        "two launches in the other order",
        "classes",
        r"launch list, launch 2: evaluation \d+ comes after evaluation \d+",
        _exchanged("plan/launches", 1, 2),
    ),
    Defect(
        "step of a launch moved",
        "classes",
        r"launch list, launch \d+: evaluation \d+ is none of",
        _launch(-1, "step", lambda step, _: step + 90),
    ),
    Defect("another variant launched", "classes", r"launch \d+|loop, evaluation \d+", _variant(1, 0), quick=True),
    Defect(
        "fewer draws of noise",
        "text",
        r"launch list: plan.noises is \d+, not",
        _set("plan/noises", lambda p: p["noises"] - 1),
        quick=True,
    ),
    Defect(
        "reads exchanged",
        "classes",
        r"loop, evaluation \d+, variant \S+, residual\.\S+: ",
        _reads(lambda r: [r[1], r[0], *r[2:]], 2),
        quick=True,
    ),
    Defect(
        "reads exchanged, text",
        "text",
        r"loop, evaluation \d+, variant \S+, cache\.\S+: |refused: .*manifest, launch \d+ \(v",
        _reads(lambda r: [r[1], r[0], *r[2:]], 2),
    ),
    Defect(
        "read of memory never written",
        "classes",
        r"loop, evaluation \d+, variant \S+, residual\.\S+: error inf",
        _beyond,
        quick=True,
    ),
    Defect(
        "read of memory never written, text",
        "text",
        r"loop, evaluation \d+, variant \S+, cache\.\S+: error inf",
        _beyond,
    ),
    Defect(
        "writes exchanged",
        "classes",
        r"loop, evaluation \d+, variant \S+, (new_)?residual\.\S+: ",
        _writes(lambda w: [w[1], w[0], *w[2:]], 2),
        quick=True,
    ),
    Defect(
        "two writes to one place",
        "text",
        r"loop, evaluation \d+, variant \S+, (new_)?cache\.\S+: |manifest",
        _writes(lambda w: [w[1], *w[1:]], 2),
    ),
    Defect(
        "writes exchanged in a segment",
        "segments",
        r"(variant \S+ by itself|loop), evaluation \d+.*, \S+: ",
        _writes(lambda w: [w[1], w[0], *w[2:]], 2),
    ),
    Defect(
        "reads exchanged in a segment",
        "segments",
        r"loop, evaluation \d+, variant \S+, \S+: |refused: .*manifest, launch \d+ \(s",
        _reads(lambda r: [r[1], r[0], *r[2:]], 2),
    ),
    Defect(
        "read of memory never written in a segment",
        "segments",
        r"(loop|variant .*), evaluation \d+, .*\S+: error inf",
        _beyond,
    ),
    Defect(
        "default guidance scale", "text", "manifest, guidance_scale: is 6.0", _set("guidance_scale", 6.0), quick=True
    ),
    Defect("no default guidance scale", "classes", "manifest, guidance_scale: is None", _set("guidance_scale", None)),
    Defect(
        "prompts lowered",
        "text",
        "manifest, lowercase: is True",
        _set("components/text_encoder/lowercase", True),
        quick=True,
    ),
    Defect("a prefix", "text", "manifest, prefix: is 'a '", _set("components/text_encoder/prefix", "a ")),
    Defect(
        "no zeros for no negative prompt",
        "text",
        "manifest, zeros_without_negative: is False",
        _set("components/text_encoder/zeros_without_negative", False),
    ),
    Defect(
        "tokens cut too early",
        "text",
        "manifest, tokenizer, length: is 15",
        _set("components/text_encoder/tokenizers/0/length", 15),
    ),
    Defect(
        "another padding",
        "text",
        "manifest, tokenizer_2, pad_id: is 1",
        _set("components/text_encoder/tokenizers/1/pad_id", 1),
        quick=True,
    ),
    Defect(
        "tokenizers' inputs exchanged",
        "text",
        "manifest, tokenizer, ids: is 'input_ids_2'",
        lambda m: (
            _set("components/text_encoder/tokenizers/0/ids", "input_ids_2")(m),
            _set("components/text_encoder/tokenizers/1/ids", "input_ids")(m),
        )[0],
    ),
    Defect(
        "null class", "classes", "manifest, components.null_class: is 0", _set("components/null_class", 0), quick=True
    ),
    Defect(
        "names of two classes exchanged",
        "classes",
        "manifest, components.class_labels: is",
        _set(
            "components/class_labels",
            lambda c: dict(zip(c["class_labels"], reversed(c["class_labels"].values()), strict=True)),
        ),
    ),
    Defect(
        "sizes told",
        "text",
        "manifest, condition time_ids, values: is",
        _set("conditions", lambda m: [{**c, "values": [2 * v for v in c["values"]]} for c in m["conditions"]]),
        quick=True,
    ),
    Defect("pixels to one of the latent", "text", "manifest, latent.scale: is 4", _set("latent/scale", 4)),
    Defect(
        "sampler's class", "classes", "launch list: sampler.class_name is", _set("sampler/class_name", "PNDMScheduler")
    ),
    Defect(
        "sampler's settings",
        "text",
        "launch list: sampler.config.beta_end is 0.013, not 0.012",
        _set("sampler/config/beta_end", 0.013),
        quick=True,
    ),
    Defect(
        "sampler's steps",
        "classes",
        "launch list: sampler.num_inference_steps is",
        _set("sampler/num_inference_steps", 50),
    ),
    Defect("evaluations", "segments", "launch list: plan.evaluations is", _set("plan/evaluations", 3)),
)

# --- graphs


def replaced(folder: Path, source: Path) -> Path:
    """A copy of a directory made of hard links; what is changed in it must be written anew."""
    shutil.copytree(source, folder, copy_function=os.link)
    return folder


def _write(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def _graph(file: str, edit: Callable[[Any], None]) -> Change:
    def change(folder: Path) -> None:
        path = folder / file if "*" not in file else sorted(folder.glob(file))[0]
        model = onnx.load(path, load_external_data=False)
        edit(model.graph)
        _write(path, model.SerializeToString())

    return change


def _nodes(graph: Any, kind: str) -> list[Any]:
    found = [node for node in graph.node if node.op_type == kind]
    assert found, f"no {kind} in {graph.name}: {sorted({node.op_type for node in graph.node})}"
    return found


def _as(kind: str, other: str, place: int = 0) -> Callable[[Any], None]:
    def edit(graph: Any) -> None:
        node = _nodes(graph, kind)[place]
        node.op_type = other
        if other == "Identity":
            del node.input[1:]
            del node.attribute[:]

    return edit


def _turned(kind: str, place: int = 0) -> Callable[[Any], None]:
    """The first two inputs exchanged."""

    def edit(graph: Any) -> None:
        node = _nodes(graph, kind)[place]
        node.input[0], node.input[1] = node.input[1], node.input[0]

    return edit


def _attribute(kind: str, name: str, value: Any, place: int = 0) -> Callable[[Any], None]:
    def edit(graph: Any) -> None:
        node = _nodes(graph, kind)[place]
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return edit


def _after(kind: str, steps: list[tuple[str, list[float], dict[str, Any]]], place: int = 0) -> Callable[[Any], None]:
    """Nodes put behind one: (operator, its second input where it has one, attributes) in turn."""

    def edit(graph: Any) -> None:
        nodes = list(graph.node)
        node = _nodes(graph, kind)[place]
        name, at = node.output[0], nodes.index(node)
        _behind(graph, nodes, at, name, steps)

    return edit


def _behind(
    graph: Any, nodes: list[Any], at: int, name: str, steps: list[tuple[str, list[float], dict[str, Any]]]
) -> None:
    inner = f"{name}/seeded"
    for place, output in enumerate(nodes[at].output):
        if output == name:
            nodes[at].output[place] = inner
    added = []
    for number, (kind, values, attributes) in enumerate(steps):
        inputs = [inner]
        if values:
            constant = f"{name}/seeded/{number}"
            graph.initializer.append(numpy_helper.from_array(np.array(values, np.float32).reshape(()), constant))
            inputs.append(constant)
        inner = name if number == len(steps) - 1 else f"{name}/seeded/out{number}"
        added.append(helper.make_node(kind, inputs, [inner], **attributes))
    nodes[at + 1 : at + 1] = added
    del graph.node[:]
    graph.node.extend(nodes)


def _output(steps: list[tuple[str, list[float], dict[str, Any]]], place: int = 0) -> Callable[[Any], None]:
    """Nodes put in front of an output of the graph."""

    def edit(graph: Any) -> None:
        name, nodes = graph.output[place].name, list(graph.node)
        at = next(number for number, node in enumerate(nodes) if name in node.output)
        _behind(graph, nodes, at, name, steps)

    return edit


def _weights_exchanged(graph: Any) -> None:
    """Two initializers of one shape refer to each other's data."""
    external = [t for t in graph.initializer if t.external_data]
    for place, one in enumerate(external):
        for other in external[place + 1 :]:
            if list(one.dims) == list(other.dims) and one.data_type == other.data_type:
                first, second = list(one.external_data), list(other.external_data)
                first, second = [helper_copy(e) for e in first], [helper_copy(e) for e in second]
                del one.external_data[:], other.external_data[:]
                one.external_data.extend(second)
                other.external_data.extend(first)
                return
    raise AssertionError("no two of one shape")


def helper_copy(entry: Any) -> Any:
    """A protobuf message of its own."""
    made = type(entry)()
    made.CopyFrom(entry)
    return made


HALF = [("Mul", [3e5], {}), ("Cast", [], {"to": 10}), ("Cast", [], {"to": 1}), ("Div", [3e5], {})]
FIRST = r"(variant \S+ by itself|loop), evaluation \d+"
_VAE, _TEXT = "VAE, images: ", r"conditions, a plain prompt, (unconditional half of )?prompt 'a photo', "

GRAPHS = (
    *(
        Defect(
            f"{engine}: {what}",
            engine,
            FIRST,
            change=_graph("graphs/*.onnx", edit),
            quick=what in ("guidance turned", "overflow in half precision"),
        )
        for engine, what, edit in (
            ("text", "guidance turned", _turned("Sub", -1)),
            ("text", "a sum becomes a difference", _as("Add", "Sub", 4)),
            ("text", "an activation becomes another", _as("Sigmoid", "Tanh", 2)),
            ("text", "attention over the wrong axis", _attribute("Softmax", "axis", 1)),
            ("text", "skips joined in the other order", _turned("Concat", -1)),
            ("text", "overflow in half precision", _after("Conv", HALF, 1)),
            ("text", "an activation cut at 0", _after("Conv", [("Relu", [], {})], 1)),
            ("classes", "guidance turned", _turned("Sub", -1)),
            ("classes", "a sum becomes a difference", _as("Add", "Sub", 6)),
            ("classes", "a modulation lost", _as("Mul", "Identity", 10)),
            ("classes", "an epsilon", _attribute("LayerNormalization", "epsilon", 0.1)),
            ("classes", "attention over the wrong axis", _attribute("Softmax", "axis", 1)),
            ("classes", "overflow in half precision", _after("MatMul", HALF, 2)),
            ("segments", "a sum becomes a difference", _as("Add", "Sub", 0)),
        )
    ),
    Defect(
        "classes: a cache written zero",
        "classes",
        FIRST + r".*, new_residual\.",
        change=_graph("graphs/v00.onnx", _output([("Mul", [0.0], {})], 1)),
        quick=True,
    ),
    Defect(
        "text: a cache written 1.01 times",
        "text",
        FIRST + r".*, new_cache\.",
        change=_graph("graphs/v00.onnx", _output([("Mul", [1.01], {})], 1)),
    ),
    Defect(
        "classes: a prediction 1.001 times",
        "classes",
        FIRST + ".*, noise_pred",
        change=_graph("graphs/v00.onnx", _output([("Mul", [1.001], {})])),
    ),
    Defect(
        "text: two weights exchanged in a graph",
        "text",
        r"weights, graphs/\S+, \S+: the graph takes it from another place",
        change=_graph("graphs/v00.onnx", _weights_exchanged),
        quick=True,
    ),
    Defect(
        "classes: two weights exchanged in a graph",
        "classes",
        r"weights, graphs/\S+, \S+: the graph takes it from another place",
        change=_graph("graphs/v00.onnx", _weights_exchanged),
    ),
    Defect(
        "encoder's output zero",
        "text",
        _TEXT + "encoder_hidden_states",
        change=_graph("components/text_encoder/model.onnx", _output([("Mul", [0.0], {})])),
        quick=True,
    ),
    Defect(
        "pooled output negated",
        "text",
        _TEXT + "text_embeds",
        change=_graph("components/text_encoder/model.onnx", _output([("Neg", [], {})], 1)),
    ),
    Defect(
        "encoder's activation",
        "text",
        _TEXT,
        change=_graph("components/text_encoder/model.onnx", _as("Sigmoid", "Tanh")),
    ),
    Defect(
        "encoder overflows in half precision",
        "text",
        _TEXT,
        change=_graph("components/text_encoder/model.onnx", _after("MatMul", HALF, 1)),
    ),
    Defect(
        "encoder: a residual turned",
        "text",
        _TEXT,
        change=_graph("components/text_encoder/model.onnx", _as("Add", "Sub", -6)),
    ),
    Defect(
        "pictures darker",
        "text",
        _VAE,
        change=_graph("components/vae_decoder/model.onnx", _output([("Mul", [0.9], {})])),
        quick=True,
    ),
    Defect(
        "pictures inverted",
        "classes",
        _VAE,
        change=_graph("components/vae_decoder/model.onnx", _output([("Neg", [], {}), ("Add", [1.0], {})])),
    ),
    Defect(
        "decoder's activation", "text", _VAE, change=_graph("components/vae_decoder/model.onnx", _as("Sigmoid", "Tanh"))
    ),
    Defect(
        "latents scaled twice",
        "classes",
        _VAE,
        change=_graph("components/vae_decoder/model.onnx", _after("Div", [("Mul", [1.5], {})])),
    ),
)

# --- weights and tokenizers


def _weight(
    folder: str, change: Callable[[np.ndarray], np.ndarray], wanted: Callable[[str], bool] = lambda name: True
) -> Change:
    """The values of the largest parameter that ``wanted`` takes."""

    def edit(engine: Path) -> None:
        stored = json.loads((engine / folder / "weights.json").read_text())["tensors"]
        names = [name for name, entry in stored.items() if entry["parameter"] and wanted(entry["parameter"])]
        entry = stored[max(names, key=lambda name: (stored[name]["length"], name))]
        path = engine / folder / "weights.bin"
        data = bytearray(path.read_bytes())
        part = slice(entry["offset"], entry["offset"] + entry["length"])
        values = np.frombuffer(bytes(data[part]), np.float32).reshape(entry["shape"])
        data[part] = np.ascontiguousarray(change(values.copy()), np.float32).tobytes()
        _write(path, bytes(data))

    return edit


def _one(value: Callable[[float], float]) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values.reshape(-1)[0] = value(values.reshape(-1)[0])
        return values

    return change


def _last_bit(values: np.ndarray) -> np.ndarray:
    values.reshape(-1).view(np.uint32)[0] ^= 1
    return values


def _tokenizer(file: str, edit: Callable[[dict[str, Any]], None]) -> Change:
    def change(engine: Path) -> None:
        path = engine / file
        document = json.loads(path.read_text(encoding="utf-8"))
        edit(document)
        _write(path, json.dumps(document, ensure_ascii=False).encode())

    return change


def _words_exchanged(document: dict[str, Any]) -> None:
    vocabulary = document["model"]["vocab"]
    vocabulary["a</w>"], vocabulary["photo</w>" if "photo</w>" in vocabulary else "p"] = (
        vocabulary["photo</w>" if "photo</w>" in vocabulary else "p"],
        vocabulary["a</w>"],
    )


def _no_merges(document: dict[str, Any]) -> None:
    del document["model"]["merges"][5:]


def _no_lowering(document: dict[str, Any]) -> None:
    document["normalizer"]["normalizers"] = [
        step for step in document["normalizer"]["normalizers"] if step["type"] != "Lowercase"
    ]


def _without_end(document: dict[str, Any]) -> None:
    document["post_processor"] = None


WEIGHTS = (
    *(
        Defect(
            f"{folder} of {engine}: {what}",
            engine,
            rf"weights, {folder}, \S+, values: error ",
            change=_weight(folder, change),
            quick=quick,
        )
        for engine, folder, what, change, quick in (
            ("text", "graphs", "one weight times 1.5", _one(lambda value: value * 1.5), True),
            ("text", "graphs", "a tensor zero", lambda values: 0 * values, False),
            ("text", "graphs", "the last bit of one weight", _last_bit, False),
            ("classes", "graphs", "a sign", _one(lambda value: -value), False),
            (
                "classes",
                "graphs",
                "a tensor reversed",
                lambda values: values.reshape(-1)[::-1].reshape(values.shape),
                False,
            ),
            ("segments", "graphs", "one weight times 1.5", _one(lambda value: value * 1.5), True),
            ("segments", "graphs", "one weight not a number", _one(lambda value: np.nan), False),
            ("text", "components/text_encoder", "one weight times 1.5", _one(lambda value: value * 1.5), True),
            ("text", "components/text_encoder", "a tensor zero", lambda values: 0 * values, False),
            ("text", "components/vae_decoder", "one weight times 1.5", _one(lambda value: value * 1.5), False),
            ("classes", "components/vae_decoder", "rows exchanged", lambda values: values[::-1], False),
        )
    ),
    Defect(
        "two words exchanged",
        "text",
        r"tokens, tokenizer, prompt '.*': id \d+ is \d+",
        change=_tokenizer("tokenizer/tokenizer.json", _words_exchanged),
        quick=True,
    ),
    Defect(
        "merges lost",
        "text",
        r"tokens, tokenizer_2, prompt '.*': id \d+ is \d+",
        change=_tokenizer("tokenizer_2/tokenizer.json", _no_merges),
    ),
    Defect(
        "upper case kept",
        "text",
        r"tokens, tokenizer, prompt 'A red SHOE.*': id \d+ is \d+",
        change=_tokenizer("tokenizer/tokenizer.json", _no_lowering),
    ),
    Defect(
        "no marks of begin and end",
        "text",
        r"tokens, tokenizer, prompt 'a photo': id 0 is \d+",
        change=_tokenizer("tokenizer/tokenizer.json", _without_end),
    ),
)

# --- the package


def _wrapped(module: str, name: str, make: Callable[[Any], Any]) -> Patch:
    def patch(monkeypatch: Any) -> None:
        import importlib

        path, _, owner = module.partition(":")
        at = importlib.import_module(path)
        at = getattr(at, owner) if owner else at
        monkeypatch.setattr(at, name, make(getattr(at, name)))

    return patch


def _reversed_draws(original: Any) -> Any:
    """The latents are drawn after the sampler's noise."""

    def randn(self: Any, shape: tuple[int, ...]) -> np.ndarray:
        if not getattr(self, "skipped", False):
            self.skipped = True
            original(self, shape)
        return np.asarray(original(self, shape))

    return randn


_PICTURE = r"picture, .*(prompt|class) .*, (latents|images): error "

PACKAGE = (
    Defect(
        "cumulated weights off",
        "text",
        LOOP + r"\d+, variant \S+, latent: ",
        patch=_wrapped(
            "dipgo_deploy.runtime.loop",
            "graph_coefficients",
            lambda f: lambda row, chain: np.float32(1.01) * np.asarray(f(row, chain)),
        ),
        quick=True,
    ),
    Defect(
        "final sum off",
        "classes",
        "loop, after the last evaluation, latents: ",
        patch=_wrapped(
            "dipgo_deploy.runtime.loop",
            "final_latent",
            lambda f: lambda stack, weights: f(stack, weights) * np.float32(1.01),
        ),
        quick=True,
    ),
    Defect(
        "final sum without the last slot",
        "text",
        "loop, after the last evaluation, latents: ",
        patch=_wrapped(
            "dipgo_deploy.runtime.loop",
            "final_latent",
            lambda f: (
                lambda stack, weights: (
                    f(stack, [*weights[:-1], 0.0]) if len(weights) < 3 else f(stack, [weights[0] * 0.9, *weights[1:]])
                )
            ),
        ),
    ),
    Defect(
        "noise drawn in another order",
        "text",
        _PICTURE,
        patch=_wrapped("dipgo_deploy.runtime.pipeline:TorchNoise", "randn", _reversed_draws),
        quick=True,
        pictures=True,
    ),
    Defect(
        "seed ignored",
        "classes",
        _PICTURE,
        patch=_wrapped("dipgo_deploy.runtime.pipeline", "TorchNoise", lambda f: lambda seed: f(12345)),
        pictures=True,
    ),
    Defect(
        "halves of guidance exchanged",
        "text",
        "conditions, ",
        patch=_wrapped(
            "dipgo_deploy.runtime.pipeline:Pipeline",
            "conditions",
            lambda f: (
                lambda self, *call: {
                    k: (b if a is None else b, b if a is None else a) for k, (a, b) in f(self, *call).items()
                }
            ),
        ),
        quick=True,
    ),
    Defect(
        "negative prompt ignored",
        "text",
        "conditions, unusual prompts, unconditional half of",
        patch=_wrapped(
            "dipgo_deploy.runtime.pipeline:Pipeline",
            "_encode",
            lambda f: (
                lambda self, prompts, negative=False: f(
                    self, ("",) * len(prompts) if negative and prompts else prompts, negative=negative
                )
            ),
        ),
    ),
    Defect(
        "default guidance ignored",
        "text",
        _PICTURE,
        patch=_wrapped("dipgo_deploy.runtime.requests", "_check_guidance", lambda f: lambda manifest, scale: 1.0),
        pictures=True,
    ),
    Defect(
        "guidance off",
        "classes",
        _PICTURE,
        patch=_wrapped(
            "dipgo_deploy.runtime.requests",
            "_check_guidance",
            lambda f: lambda manifest, scale: f(manifest, scale) + 0.1,
        ),
        pictures=True,
    ),
    Defect(
        "the last token lost",
        "text",
        r"tokens, tokenizer, prompt 'a photo': id 15 is 1",
        patch=_wrapped(
            "dipgo_deploy.runtime.text:PromptTokenizer",
            "__call__",
            lambda f: (
                lambda self, prompts: {
                    k: np.where(np.arange(v.shape[1]) == v.shape[1] - 1, 1, v) for k, v in f(self, prompts).items()
                }
            ),
        ),
    ),
    Defect(
        "prompts stripped",
        "text",
        r"tokens, tokenizer, prompt '.*': id|conditions",
        patch=_wrapped(
            "dipgo_deploy.runtime.text:TextEncoder",
            "tokens",
            lambda f: lambda self, prompt, negative=False: f(self, prompt.split(",")[0], negative=negative),
        ),
    ),
    Defect(
        "pictures in another order",
        "text",
        _PICTURE,
        patch=_wrapped(
            "dipgo_deploy.runtime.pipeline:Pipeline",
            "_images",
            lambda f: lambda self, request, latents: f(self, request, latents[::-1]),
        ),
        pictures=True,
    ),
    Defect(
        "latents decoded twice as large",
        "classes",
        "VAE, images: ",
        patch=_wrapped(
            "dipgo_deploy.runtime.image:Decoder", "__call__", lambda f: lambda self, latents: f(self, 2 * latents)
        ),
    ),
    Defect(
        "classes off by one",
        "classes",
        "conditions, classes, class 0, class_labels: ",
        patch=_wrapped(
            "dipgo_deploy.runtime.requests", "_class_id", lambda f: lambda manifest, label: f(manifest, label) + 1
        ),
    ),
    Defect(
        "pictures cut at 0.9",
        "text",
        r"VAE, images: |picture",
        patch=_wrapped(
            "dipgo_deploy.runtime.image:Decoder",
            "__call__",
            lambda f: lambda self, latents: np.minimum(f(self, latents), 0.5),
        ),
    ),
)

DEFECTS = (*MANIFESTS, *GRAPHS, *WEIGHTS, *PACKAGE)

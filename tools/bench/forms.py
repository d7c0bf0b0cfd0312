"""Other forms of the graph that computes everything, beside the exported one: does ONNX Runtime run any of them faster?

    python -m tools.bench.forms fashion-dit --collect docs/results/forms.json
    python -m tools.bench.forms sd-1.5-512 --height 512 --work FOLDER --repeats 5 --collect docs/results/forms.json

The forms are made here and not by the export: ``MultiHeadAttention`` is ONNX Runtime's own, and TensorRT does not read
it.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from dipgo_deploy.bundle.manifest import Manifest
from dipgo_deploy.cli.common import emit, entry_point, human_console, json_option
from dipgo_deploy.export.exporter import ExportOptions, plan_export
from dipgo_deploy.models.target import schedule_target
from dipgo_deploy.reference.quiet import quiet_libraries
from dipgo_deploy.schedule import builders
from dipgo_deploy.search.latency import example
from tools.bench.measure import machine, machine_line, spread
from tools.bench.pairs import write_engine
from tools.bench.peers import model_of
from tools.bench.tables import table, with_earlier, with_quartiles, write_results

if TYPE_CHECKING:
    import onnx_ir as ir

_PATH = click.Path(path_type=Path)
# Of opset 23; GroupNormalization, which changed on the way there, is not traced by any model.
_ATTENTION_OPSET = 23
_SHORT = 0.1  # seconds


@click.command(name="forms")
@click.argument("model")
@click.option("--height", type=int, help="Pixels, square.  [default: the model's own]")
@click.option("--work", type=_PATH, help="Folder for models of tools.full_size: kept there, and used again.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--repeats", type=click.IntRange(min=3), default=100, show_default=True, help="Rounds.")
@click.option("--collect", type=_PATH, help="Add to this file (.json), with a table for readers beside it.")
@json_option
def command(
    model: str, height: int | None, work: Path | None, threads: int, repeats: int, collect: Path | None, as_json: bool
) -> None:
    """Time the full graph of MODEL (built-in, a folder, or a name of tools.full_size) in every form."""
    quiet_libraries()
    console = human_console(as_json)
    folder = model_of(model, work, console.print)
    console.print(f"{model}: exporting", markup=False)
    with tempfile.TemporaryDirectory() as temporary:
        engine_dir = Path(temporary) / "engine"
        target = schedule_target(folder, "ddim", 2)
        schedule = target.schedule(builders.full(target.steps, len(target.blocks)), "full", {})
        options = ExportOptions(layout="variants", components=False, check=False, height=height, width=height)
        write_engine(plan_export(folder, schedule, options), engine_dir)
        gc.collect()  # the model in PyTorch
        manifest = Manifest.load(engine_dir)
        (variant,) = manifest.plan.variants
        latent = [manifest.latent.height, manifest.latent.width]
        facts = {
            "model": model,
            "latent": latent,
            "machine": machine(threads),
            "forms": measured_forms(engine_dir / variant.graph.file, threads, repeats, console.print),
        }
    console.print(as_text([facts]), markup=False, soft_wrap=True)
    if collect is not None:
        rows = with_earlier(collect, [facts], itemgetter("model", "latent"))
        write_results(collect, {"rows": rows}, as_text(rows))
    emit(facts, as_json)


main = entry_point(command)


@dataclass(frozen=True)
class _Attention:
    """The nodes of one attention. query, key, value: before they are cut into heads, (batch, tokens, channels)."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    heads: int
    scale: float
    product: ir.Node
    joined: ir.Node  # the heads together again


def measured_forms(graph: Path, threads: int, repeats: int, notify: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Each form against the exported graph, two sessions at a time: processor seconds of a run in turn, their ratio,
    nodes, and the largest difference relative to the largest value."""
    import onnx_ir as ir

    found: dict[str, dict[str, Any]] = {}
    for name, change in FORMS.items():
        notify(f"{name}: {repeats} rounds")
        model = ir.load(graph)
        places = change(model)
        changed = graph.with_name("form.onnx")
        ir.save(model, changed)
        sessions = [_session(file, threads) for file in (graph, changed)]
        feeds = _inputs(sessions[0])
        first = [session.run(None, feeds) for session in sessions]
        times = np.array([_round(sessions, feeds, turn % 2 == 1) for turn in range(repeats)])
        found[name] = {
            "places": places,
            "nodes": len(model.graph),
            "seconds": spread(times[:, 1]),
            "exported_seconds": spread(times[:, 0]),
            "times_exported": spread(times[:, 1] / times[:, 0]),
            "difference": max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(*first, strict=True)),
        }
        del sessions
        changed.unlink()
    return found


def _session(file: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _inputs(session: Any) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {spec.name: example(spec, random) for spec in session.get_inputs()}


def _round(sessions: Sequence[Any], feeds: Mapping[str, np.ndarray], backwards: bool) -> list[float]:
    """Seconds of each, whoever begins; a short run is timed at the second time, when its weights are at hand."""
    found = [0.0] * len(sessions)
    for place in sorted(range(len(sessions)), reverse=backwards):
        found[place] = _seconds(sessions[place], feeds)
        if found[place] < _SHORT:
            found[place] = _seconds(sessions[place], feeds)
    return found


def _seconds(session: Any, feeds: Mapping[str, np.ndarray]) -> float:
    start = time.process_time()
    session.run(None, feeds)
    return time.process_time() - start


def keys_transposed_once(model: ir.Model) -> int:
    """The trace transposes keys twice, in three dimensions the second time; here once."""
    import onnx_ir as ir

    places = 0
    for found in list(_attentions(model)):
        scaled = found.product.inputs[1]
        last = None if scaled is None else scaled.producer()
        source = None if last is None or last.op_type != "Mul" else last.inputs[0]
        if source is None or last is None:
            continue
        heads = ir.node(
            "Reshape", [found.key, _constant(model, f"{scaled.name}/heads", [0, 0, found.heads, -1])], num_outputs=1
        )
        once = ir.node("Transpose", heads.outputs, attributes={"perm": [0, 2, 3, 1]}, num_outputs=1)
        model.graph.insert_before(last, [heads, once])
        last.replace_input_with(0, once.outputs[0])
        places += 1
    return _tidy(model, places)


def one_product(model: ir.Model) -> int:
    """Products of one input with several weights become one with the weights side by side, as queries, keys and values
    of self-attention are."""
    import onnx_ir as ir

    by_input: dict[ir.Value, list[tuple[ir.Node, ir.Node]]] = {}
    for node in model.graph:
        if node.op_type == "MatMul" and node.inputs[1] is not None and node.inputs[1].const_value is not None:
            uses = node.outputs[0].uses()
            after = next(iter(uses)).node if len(uses) == 1 else None
            biased = after is not None and after.op_type == "Add"
            if after is not None and biased and any(side and side.const_value is not None for side in after.inputs):
                by_input.setdefault(node.inputs[0], []).append((node, after))
    places = 0
    for value, pairs in by_input.items():
        if len(pairs) < 2:
            continue
        name = pairs[0][0].name
        weights = [pair[0].inputs[1].const_value.numpy() for pair in pairs]
        biases = [next(side for side in pair[1].inputs if side.const_value is not None) for pair in pairs]
        weight = _constant(model, f"{name}/weights", np.concatenate(weights, axis=1))
        bias = _constant(model, f"{name}/biases", np.concatenate([side.const_value.numpy() for side in biases]))
        sizes = _constant(model, f"{name}/sizes", [part.shape[1] for part in weights])
        product = ir.node("MatMul", [value, weight], num_outputs=1)
        added = ir.node("Add", [product.outputs[0], bias], num_outputs=1)
        split = ir.node("Split", [added.outputs[0], sizes], attributes={"axis": -1}, num_outputs=len(pairs))
        model.graph.insert_before(pairs[0][0], [product, added, split])
        for (_, after), part in zip(pairs, split.outputs, strict=True):
            after.outputs[0].replace_all_uses_with(part, replace_graph_outputs=True)
        places += 1
    return _tidy(model, places)


def multi_head_attention(model: ir.Model) -> int:
    """ONNX Runtime's own operator, which never holds all scores."""
    return _fused(model, "MultiHeadAttention", "com.microsoft", 1, ("num_heads",))


def onnx_attention(model: ir.Model) -> int:
    """The operator of ONNX's opset 23."""
    model.graph.opset_imports[""] = _ATTENTION_OPSET
    return _fused(model, "Attention", "", _ATTENTION_OPSET, ("q_num_heads", "kv_num_heads"))


def both(model: ir.Model) -> int:
    """``MultiHeadAttention`` behind one product."""
    return multi_head_attention(model) + one_product(model)


FORMS: Mapping[str, Callable[[Any], int]] = {
    "as exported": lambda model: 0,
    "keys transposed once": keys_transposed_once,
    "queries, keys and values in one product": one_product,
    "Attention of opset 23": onnx_attention,
    "MultiHeadAttention": multi_head_attention,
    "MultiHeadAttention and one product": both,
}


def _fused(model: ir.Model, operator: str, domain: str, version: int, heads: Sequence[str]) -> int:
    import onnx_ir as ir

    places = 0
    for found in list(_attentions(model)):
        attributes = {**dict.fromkeys(heads, found.heads), "scale": found.scale}
        node = ir.node(
            operator, [found.query, found.key, found.value], attributes=attributes, domain=domain, num_outputs=1
        )
        model.graph.insert_before(found.joined, node)
        found.joined.outputs[0].replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)
        places += 1
    model.graph.opset_imports[domain] = version
    return _tidy(model, places)


def _attentions(model: ir.Model) -> Iterator[_Attention]:
    """Every softmax(q k) v without a mask, as torch traces it."""
    for node in model.graph:
        if node.op_type != "Softmax":
            continue
        product, after = node.inputs[0].producer(), _only_use(node)
        moved = None if after is None else _only_use(after)
        joined = None if moved is None else _only_use(moved)
        if product is None or product.op_type != "MatMul" or joined is None or joined.op_type != "Reshape":
            continue
        left, right = (_scaled(side) for side in product.inputs)
        if left is None or right is None or after is None:
            continue
        query, key, value = (_whole(side) for side in (left[0], right[0], after.inputs[1]))
        if query is not None and key is not None and value is not None:
            heads = int(left[0].shape[1])
            yield _Attention(query, key, value, heads, left[1] * right[1], product, joined)


def _scaled(value: ir.Value) -> Any:
    """What is multiplied by a number, and the number; None where it is none."""
    node = value.producer()
    if node is None or node.op_type != "Mul" or node.inputs[1].const_value is None:
        return None
    return node.inputs[0], float(node.inputs[1].const_value.numpy().reshape(-1)[0])


def _whole(value: ir.Value) -> ir.Value | None:
    """What was reshaped and transposed into ``value``: three dimensions in the place of four."""
    while (node := value.producer()) is not None and node.op_type in ("Reshape", "Transpose"):
        value = node.inputs[0]
        if value.shape is not None and len(value.shape) == 3 and node.op_type == "Reshape" and _cuts_heads(node):
            return value
    return None


def _cuts_heads(node: ir.Node) -> bool:
    """Whether a reshape cuts the channels of (batch, tokens, channels) and leaves the rest."""
    before, after = node.inputs[0].shape, node.outputs[0].shape
    return after is not None and len(after) == 4 and list(after[:2]) == list(before[:2])


def _only_use(node: ir.Node) -> ir.Node | None:
    uses = node.outputs[0].uses()
    return next(iter(uses)).node if len(uses) == 1 else None


def _constant(model: ir.Model, name: str, values: Any) -> ir.Value:
    import onnx_ir as ir

    tensor = ir.tensor(np.asarray(values, np.int64 if isinstance(values, list) else None), name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _tidy(model: ir.Model, places: int) -> int:
    import onnx_ir.passes.common as common

    common.RemoveUnusedNodesPass()(model)
    return places


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The results for readers."""
    parts = [
        "# Other forms of a graph\n",
        "The graph that computes every block, fp32, one image with guidance, in other forms than the export writes, on "
        "ONNX Runtime's CPU provider. Processor time of a run, in turn with the exported form in the same round; "
        "median, quartiles in brackets. `places`: how often the form was found and made. `difference`: largest one of "
        "all outputs, relative to the largest value. Made by `python -m tools.bench.forms`.\n",
    ]
    for row in rows:
        height, width = row["latent"]
        parts.append(f"## {row['model']}, {height}x{width} latents\n\n{machine_line(row['machine'])}.\n")
        parts.append(table(_HEADINGS, [_cells(name, facts) for name, facts in row["forms"].items()]))
    return "\n".join(parts)


_HEADINGS = ("form", "places", "nodes", "ms", "times the exported form", "difference")


def _cells(name: str, facts: Mapping[str, Any]) -> Sequence[str]:
    milliseconds = {key: 1e3 * value for key, value in facts["seconds"].items()}
    return (
        *(name, str(facts["places"]), str(facts["nodes"]), with_quartiles(milliseconds, 2)),
        *(with_quartiles(facts["times_exported"], 3), f"{facts['difference']:.1e}"),
    )


if __name__ == "__main__":
    raise SystemExit(main(None))

"""The values inside a graph: a graph run with any of them as outputs, and parts of it run on given values.

On ONNX Runtime's CPU provider with its optimisations off, so that each node is computed as it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dipgo_deploy.backends.onnxruntime_pairs import suit_folder

if TYPE_CHECKING:
    import onnx

Arrays = Mapping[str, np.ndarray]
RunModel = Callable[["onnx.ModelProto", Path, Arrays], dict[str, np.ndarray]]
"""Runs a model whose large weights lie in a folder: inputs by name -> outputs by name."""

_MADE = "::made"
# Taken for a value whose shape is not known.
_UNKNOWN_BYTES = 16 * 2**20


class InnerGraph:
    """A graph file, with the places of its values; the weights stay in their files.

    values: names of what nodes give, in order of execution.
    """

    def __init__(self, path: Path) -> None:
        import onnx

        self.folder = path.parent
        self.model = onnx.load(path, load_external_data=False)
        self.nodes: tuple[onnx.NodeProto, ...] = tuple(self.model.graph.node)
        self.initializers = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.inputs = {value.name: value for value in self.model.graph.input if value.name not in self.initializers}
        self.outputs = tuple(value.name for value in self.model.graph.output)
        self._producer = {name: place for place, node in enumerate(self.nodes) for name in node.output if name}
        self.values = tuple(self._producer)

    def given(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """The graph's inputs out of ``feeds``, in the types that it takes."""
        return {name: feeds[name].astype(_numpy_type(value), copy=False) for name, value in self.inputs.items()}

    def run(self, feeds: Arrays, names: Sequence[str], run: RunModel | None = None) -> dict[str, np.ndarray]:
        """The values ``names`` (inputs and initializers are none), which become outputs beside those of the graph.

        run: another way to run it.
        """
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        present = set(self.outputs)
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
        found = (run or run_plainly)(model, self.folder, self.given(feeds))
        return {name: found[name] for name in names}

    def ancestors(self, value: str, until: Iterable[str] = ()) -> tuple[int, ...]:
        """Places of the nodes that ``value`` is made by, in order of execution; ``until``: values that are not
        followed further."""
        stop, seen, waiting = set(until), set(), [value]
        while waiting:
            place = self._producer.get(waiting.pop())
            if place is None or place in seen:
                continue
            seen.add(place)
            waiting += [name for name in reads(self.nodes[place]) if name not in stop]
        return tuple(sorted(seen))

    def read_by(self, places: Iterable[int]) -> set[str]:
        """What nodes read and none of them makes, without initializers."""
        nodes = [self.nodes[place] for place in places]
        made = {name for node in nodes for name in node.output}
        return {name for node in nodes for name in reads(node)} - made - self.initializers.keys()

    def leaving_scopes(self, scopes: Iterable[str]) -> dict[str, str]:
        """The values that are the one result of a scope (a dotted path of modules, which names of nodes begin with):
        what nodes inside it make and others read, or the graph gives. By value the innermost scope."""
        inside: dict[str, set[int]] = {scope: set() for scope in scopes}
        for place, node in enumerate(self.nodes):
            path = node.name.rpartition("/")[0].split(".")
            for depth in range(len(path)):
                scope = ".".join(path[: depth + 1])
                if scope in inside:
                    inside[scope].add(place)
        readers: dict[str, set[int]] = {}
        for place, node in enumerate(self.nodes):
            for name in reads(node):
                readers.setdefault(name, set()).add(place)
        found: dict[str, str] = {}
        for scope, places in sorted(inside.items(), key=lambda item: item[0].count(".")):
            made = [name for place in places for name in self.nodes[place].output if name]
            left = [name for name in made if name in self.outputs or readers.get(name, set()) - places]
            if len(left) == 1:
                found[left[0]] = scope
        return found

    def part(self, places: Sequence[int], wanted: Sequence[str], given: Arrays) -> onnx.ModelProto:
        """The nodes at ``places`` as a model: what they read of ``given`` are its inputs, also where one of them makes
        it, and ``wanted`` its outputs. What is both has the name ``made_name`` as an output."""
        import onnx

        nodes = []
        for place in places:
            node = onnx.NodeProto()
            node.CopyFrom(self.nodes[place])
            node.output[:] = [made_name(name) if name in given else name for name in node.output]
            nodes.append(node)
        used = {name for node in nodes for name in reads(node)}
        graph = onnx.helper.make_graph(
            nodes,
            self.model.graph.name or "part",
            [self._input(name, given[name]) for name in sorted(used & given.keys())],
            [onnx.ValueInfoProto(name=made_name(name) if name in given else name) for name in wanted],
            [tensor for name, tensor in self.initializers.items() if name in used],
        )
        model = onnx.helper.make_model(graph, opset_imports=self.model.opset_import, functions=self.model.functions)
        model.ir_version = self.model.ir_version
        return model

    def cast(self, name: str, array: np.ndarray) -> np.ndarray:
        """A value in the type that this graph has it in; as it is where the graph does not say."""
        known = self._types.get(name)
        return array if known is None else array.astype(_numpy_type(known), copy=False)

    def nbytes(self, feeds: Arrays) -> dict[str, int]:
        """Bytes of each value for inputs of these shapes; a guess where the shape cannot be told."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        del model.graph.value_info[:]
        for value in model.graph.input:
            if value.name in feeds:
                shape = value.type.tensor_type.shape
                del shape.dim[:]
                shape.dim.extend(onnx.TensorShapeProto.Dimension(dim_value=n) for n in feeds[value.name].shape)
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        return {value.name: _nbytes(value) for value in (*inferred.value_info, *inferred.output)}

    @cached_property
    def _types(self) -> dict[str, Any]:
        graph = self.model.graph
        known = {value.name: value for value in (*graph.input, *graph.value_info, *graph.output)}
        return {name: value for name, value in known.items() if value.type.tensor_type.elem_type}

    def _input(self, name: str, array: np.ndarray) -> onnx.ValueInfoProto:
        import onnx

        dtype = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        return onnx.helper.make_tensor_value_info(name, dtype, list(array.shape))


def made_name(name: str) -> str:
    """The name of an output of ``InnerGraph.part`` whose own name is an input's."""
    return f"{name}{_MADE}"


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads, also inside its subgraphs."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            inside = {name for inner in graph.node for name in inner.output}
            inside |= {tensor.name for tensor in graph.initializer} | {value.name for value in graph.input}
            yield from (name for inner in graph.node for name in reads(inner) if name not in inside)


def run_plainly(model: onnx.ModelProto, folder: Path, feeds: Arrays) -> dict[str, np.ndarray]:
    """On the CPU with optimisations off; what is not among the model's inputs is left out."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")  # it would copy the weights
    options.enable_cpu_mem_arena = False
    return run_with(options, ("CPUExecutionProvider",))(model, folder, feeds)


def run_with(options: Any, providers: Sequence[Any]) -> RunModel:
    """How ONNX Runtime runs a model with these session options on these providers."""

    def run(model: onnx.ModelProto, folder: Path, feeds: Arrays) -> dict[str, np.ndarray]:
        import onnxruntime

        options.log_severity_level = 4  # what fails is raised
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        suit_folder(options, folder)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=list(providers))
        taken = {value.name for value in session.get_inputs()}
        names = [value.name for value in session.get_outputs()]
        given = {name: array for name, array in feeds.items() if name in taken}
        return dict(zip(names, session.run(names, given), strict=True))

    return run


def _numpy_type(value: onnx.ValueInfoProto) -> np.dtype[Any]:
    import onnx

    return onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)


def _nbytes(value: onnx.ValueInfoProto) -> int:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape") or not all(dim.HasField("dim_value") for dim in tensor.shape.dim):
        return _UNKNOWN_BYTES
    return int(np.prod([dim.dim_value for dim in tensor.shape.dim], dtype=np.int64)) * _numpy_type(value).itemsize

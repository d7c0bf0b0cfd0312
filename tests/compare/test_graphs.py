"""Running a graph once for a comparison: what it holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LAYERS, WIDTH = 16, 512

# A process of its own: the kernel's peak is of a whole process.
_RUN = """
import sys
from pathlib import Path
from types import SimpleNamespace as Spec
import numpy as np
from dipgo_deploy.compare.graphs import frugal_session

def status(key):
    return int(Path("/proc/self/status").read_text().partition(key + ":")[2].split()[0])

path, layers, width = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
outputs = [Spec(name=f"y{i}") for i in range(0, layers, 2)]
graph = Spec(file=path.name, inputs=[Spec(name="x", dtype="float16")], outputs=outputs)
entry, inputs = Spec(graph=graph), {"x": np.ones((1, width), np.float32)}
bundle = Spec(path=path.parent, manifest=Spec(dtype="fp16"))

def run_graph():
    with frugal_session(bundle, entry) as run:
        run(inputs)

run_graph()  # what a first run loads stays loaded
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
run_graph()
print(status("VmHWM") - before)
"""


def _chain(path: Path) -> None:
    """float16 products one after the other, every second one an output, weights beside the graph."""
    rng = np.random.default_rng(0)
    kind = TensorProto.FLOAT16
    weights = [
        numpy_helper.from_array((rng.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5).astype(np.float16), f"w{i}")
        for i in range(LAYERS)
    ]
    nodes = [helper.make_node("MatMul", [f"y{i - 1}" if i else "x", f"w{i}"], [f"y{i}"]) for i in range(LAYERS)]
    inputs = [helper.make_tensor_value_info("x", kind, [1, WIDTH])]
    outputs = [helper.make_tensor_value_info(f"y{i}", kind, [1, WIDTH]) for i in range(0, LAYERS, 2)]
    graph = helper.make_graph(nodes, "chain", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)


def test_half_precision_weights_are_converted_one_at_a_time(tmp_path: Path) -> None:
    _chain(tmp_path / "chain.onnx")
    command = [sys.executable, "-c", _RUN, str(tmp_path / "chain.onnx"), str(LAYERS), str(WIDTH)]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    half = LAYERS * WIDTH**2 * 2 // 1024
    # Mapped in float16, and one in float32 (an eighth of this in float16); all of them in float32 would be 3 times it.
    assert int(done.stdout) < 1.6 * half

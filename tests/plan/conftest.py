from __future__ import annotations

import pytest

from dipgo_deploy.plan.graph import Block, BlockGraph, Value


def _unet() -> BlockGraph:
    """Nine blocks wired as in Stable Diffusion 1.5, with skips; node 0, the time embedding, is shared by all blocks."""
    names = ["D0", "D1", "D2", "D3", "M", "U0", "U1", "U2", "U3"]
    outputs = {name: (f"{name}/out0",) for name in names}
    for name in ("D0", "D1", "D2"):
        outputs[name] = (f"{name}/out0", f"{name}/out1", f"{name}/out2")
    outputs["D3"] = ("D3/out0", "D3/out1")
    values: dict[str, Value] = {}

    def add(name: str, reads: set[str], node: int) -> None:
        values[name] = Value(name, 64 + 16 * node, frozenset(reads), frozenset({0, node}))

    add("conv_in", {"stack"}, 1)
    node, last = 2, "conv_in"
    for name in names[:4]:
        before = last
        for output in reversed(outputs[name]):  # the skips come first, the hidden state is the last of them on
            add(output, {before, "text", "timestep"}, node)
            before, node = output, node + 1
        last = outputs[name][0]
    add("M/out0", {last, "text", "timestep"}, node)
    last, skips = "M/out0", {"U0": "D3", "U1": "D2", "U2": "D1", "U3": "D0"}
    for name, skip in skips.items():
        node += 1
        extra = {"conv_in"} if name == "U3" else set()
        add(f"{name}/out0", {last, *outputs[skip], *extra, "text", "timestep"}, node)
        last = f"{name}/out0"
    values["noise_pred"] = Value("noise_pred", 64, frozenset({"U3/out0", "guidance_scale"}), frozenset({node + 1}))
    return BlockGraph(
        inputs={"stack": "step", "timestep": "step", "text": "constant", "guidance_scale": "constant"},
        values=values,
        blocks=tuple(Block(name, outputs[name]) for name in names),
        predictions=("noise_pred",),
        costs=tuple(10 * (i + 1) for i in range(node + 2)),
    )


def _chain(cache: str, blocks: int = 4) -> BlockGraph:
    """A transformer: an embedding, blocks in a row, and a head that also reads the timestep. Node i costs 10**i."""
    values = {"embed": Value("embed", 32, frozenset({"stack"}), frozenset({0}))}
    last, made = "embed", []
    for i in range(blocks):
        name = f"b{i}/out0"
        values[name] = Value(name, 32, frozenset({last, "timestep"}), frozenset({i + 1}))
        made.append(Block(f"b{i}", (name,), cache, (last,) if cache == "residual" else ()))  # type: ignore[arg-type]
        last = name
    values["noise_pred"] = Value("noise_pred", 8, frozenset({last, "timestep"}), frozenset({blocks + 1}))
    return BlockGraph(
        {"stack": "step", "timestep": "step"},
        values,
        tuple(made),
        ("noise_pred",),
        tuple(10**i for i in range(blocks + 2)),
    )


@pytest.fixture
def unet() -> BlockGraph:
    return _unet()


@pytest.fixture
def chain():
    return _chain

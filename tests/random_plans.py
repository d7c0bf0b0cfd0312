"""Random block graphs, traced models and schedules, and the supernet's definition on them; for the tests of plans."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from zlib import crc32

from dipgo_deploy.plan.graph import Block, BlockGraph, Value
from dipgo_deploy.plan.pieces import Node, NodeGraph, Tensor
from dipgo_deploy.schedule.forecast import MOST_TERMS, FittedForecast, Forecast, RuleForecast, stored_before
from dipgo_deploy.schedule.guidance import HALVES, UNCONDITIONAL

# Values are residues: adding and subtracting is exact, and different computations collide with chance 2**-61.
PRIME = 2**61 - 1
BIG = 10_000  # bytes of a weight that must be in one graph only


def compute(name: str, arguments: Sequence[int]) -> int:
    return hash((crc32(name.encode()), *arguments)) % PRIME


def graph_input(graph: BlockGraph, name: str, step: int, half: str | None = None) -> int:
    return compute(behind(name, half), [step if graph.inputs[name] == "step" else -1])


def residual_source(graph: BlockGraph) -> dict[str, str]:
    return {o: i for b in graph.blocks if b.cache == "residual" for o, i in zip(b.outputs, b.inputs, strict=True)}


def residue(weight: float) -> int:
    """A weight as a residue: exact, and 0 and 1 stay what they are."""
    exact = Fraction(weight)
    return exact.numerator * pow(exact.denominator, -1, PRIME) % PRIME


class Kept:
    """What blocks stored, and what is read of it."""

    def __init__(self, forecast: Forecast | None) -> None:
        self._forecast = forecast
        self._values: dict[str, list[tuple[int, int | None]]] = {}

    def store(self, output: str, step: int, value: int | None) -> None:
        self._values[output] = [(step, value), *self._values.get(output, [])][:MOST_TERMS]

    def hide(self, output: str, step: int) -> None:
        """From now on there is nothing to read."""
        self._values.pop(output, None)

    def read(self, output: str, step: int, block: int, since: int = -1) -> int | None:
        values = [known for known in self._values.get(output, []) if known[0] > since]
        if not values:
            return None
        weights: Sequence[float] = (1.0,)
        if self._forecast is not None:
            weights = self._forecast.weights_of(step, block, [at for at, _ in values])
        used = [value for _, value in values[: len(weights)]]
        if None in used:
            return None
        return sum(residue(weight) * value for weight, value in zip(weights, used, strict=True)) % PRIME


def random_forecast(
    rng: random.Random, gates: Sequence[Sequence[bool]], shares: Sequence[float] = ()
) -> Forecast | None:
    """None, a rule, or weights of which many are zero or one; with guidance (``shares``) no weights."""
    kind = rng.choice(["none", "taylor"] if shares else ["none", "taylor", "weights", "weights"])
    if kind == "taylor":
        return RuleForecast(kind="taylor", order=rng.choice([1, 2]))
    if kind == "weights":
        rows = []
        for row, stored in zip(gates, stored_before(gates), strict=True):
            lists = [[rng.randint(-1, 2) for _ in range(rng.randint(0, len(known)))] for known in stored]
            rows.append([[] if kept else cell for kept, cell in zip(row, lists, strict=True)])
        return FittedForecast(kind="weights", weights=rows)
    return None


def naive(
    graph: BlockGraph,
    gates: Sequence[Sequence[bool]],
    forecast: Forecast | None = None,
    denoisers: Sequence[int] | None = None,
    shares: Sequence[float] | None = None,
) -> list[int | None]:
    """Predictions by the definition: kept blocks compute and store, removed ones read. None: a store was missing.

    denoisers: of each evaluation, of ``random_turns``; with ``shares``, of ``random_halves``, that of the guidance.
    """
    owner = {output: k for k, block in enumerate(graph.blocks) for output in block.outputs}
    source = residual_source(graph)
    store = Kept(forecast)
    alone: dict[str, int] = {}  # the last conditional-only evaluation that stored it
    predictions = []
    for step, row in enumerate(gates):
        known: dict[str, int | None] = {name: graph_input(graph, name, step) for name in graph.inputs}
        is_alone = shares is not None and shares[step] == 0

        def read(name: str, step=step, is_alone=is_alone) -> int | None:
            block = owner[name] % len(graph.schedule_blocks)
            return store.read(name, step, block, -1 if is_alone else alone.get(name, -1))

        def value(name: str, step=step, row=row, known=known, read=read) -> int | None:
            if name not in known:
                if name not in owner or row[owner[name]]:
                    arguments = [value(read) for read in sorted(graph.values[name].reads)]
                    scaled = name if shares is None or name != graph.predictions[0] else f"{name}*{shares[step]}"
                    known[name] = None if None in arguments else compute(scaled, arguments)
                elif name in source:
                    parts = value(source[name]), read(name)
                    known[name] = None if None in parts else sum(parts) % PRIME
                else:
                    known[name] = read(name)
            return known[name]

        for block, kept in zip(graph.blocks, row, strict=True):
            for output in block.outputs if kept and is_run(block, denoisers, step) else ():
                made, origin = value(output), value(source[output]) if output in source else 0
                fresh = None if made is None or origin is None else (made - origin) % PRIME
                store.store(output, step, fresh)
                store_half(store, graph, output, step, fresh, alone=is_alone)
                if is_alone:
                    alone[output] = step
        predictions.append(value(graph.predictions[0 if denoisers is None else denoisers[step]]))
    return predictions


def half_of(value: int) -> int:
    """The conditional half: of a difference it is the difference of the halves."""
    return 7 * value % PRIME


def store_half(
    store: Kept, graph: BlockGraph, output: str, step: int, fresh: int | None, *, alone: bool = False
) -> None:
    """A guided value has a conditional half; a conditional-only one takes the guided one's place, or leaves the
    unconditional one behind."""
    for name, conditional in graph.pairs.items() if alone else ():
        if conditional == output:
            store.hide(name, step)
    if output in graph.halves:
        store.hide(graph.halves[output], step)
    for name, whole in graph.halves.items():
        if whole == output:
            store.store(name, step, None if fresh is None else half_of(fresh))


def random_halves(rng: random.Random) -> tuple[BlockGraph, list[list[bool]], list[float]]:
    """A graph under ``d0.`` with its conditional-only twin under ``d1.``, gates, and the share of the guidance of each
    evaluation."""
    part = random_graph(rng)
    while part.predictions[0] in {output for block in part.blocks for output in block.outputs}:
        part = random_graph(rng)
    twin = replace(part, values={n: replace(v, nbytes=2 * v.nbytes) for n, v in part.values.items()}).with_halves()
    known = {name: f"d1.{whole}" for name, whole in twin.halves.items()} | {name: f"d0.{name}" for name in part.values}

    def named(name: str) -> str:
        return known.get(name, name)

    values = {
        named(v.name): Value(named(v.name), v.nbytes, frozenset(map(named, v.reads)), v.work)
        for v in twin.values.values()
    }
    names = [f"d{place}.{block.name}" for place in range(2) for block in part.blocks]
    blocks = tuple(
        Block(name, tuple(map(named, block.outputs)), block.cache, tuple(map(named, block.inputs)))
        for name, block in zip(names, twin.blocks, strict=True)
    )
    halves = {named(name): named(whole) for name, whole in twin.halves.items()}
    graph = BlockGraph(part.inputs, values, blocks, tuple(map(named, twin.predictions)), twin.costs, halves)
    shares = random_shares(rng)
    return graph, random_gates(rng, len(shares), len(part.blocks)), shares


def of_shares(shares: Sequence[float]) -> list[int]:
    """Which of a graph's predictions each evaluation makes."""
    return [int(share == 0) for share in shares]


def is_run(block: Block, denoisers: Sequence[int] | None, step: int) -> bool:
    """Whether an evaluation runs the denoiser that a block is of, or the half of guidance."""
    if denoisers is None or not block.name.startswith("d"):
        return denoisers is None or not (denoisers[step] and block.name.endswith(UNCONDITIONAL))
    return block.name.startswith(f"d{denoisers[step]}.")


def with_guide(graph: BlockGraph) -> BlockGraph:
    """A random graph as it is traced for one half of guidance at a time."""
    (prediction,) = graph.predictions
    nbytes = graph.values[prediction].nbytes
    guided = Value("guided", nbytes, frozenset({*HALVES, "scale"}), frozenset({len(graph.costs)}))
    inputs = {**graph.inputs, **dict.fromkeys(HALVES, "step"), "scale": "constant"}
    values = {**graph.values, "guided": guided}
    return replace(graph, inputs=inputs, values=values, costs=(*graph.costs, 1), guides={"guided": prediction})


def random_shares(rng: random.Random) -> list[float]:
    """Of the guidance, of each evaluation."""
    return [rng.choice([1.0, 1.0, 0.5, 0.0, 0.0]) for _ in range(rng.randint(2, 8))]


def behind(name: str, half: str | None) -> str:
    """A value of one half by the name that it has beside the other."""
    return name + UNCONDITIONAL if half == "unconditional" else name


def random_turns(rng: random.Random) -> tuple[BlockGraph, list[list[bool]], list[int]]:
    """Two graphs under ``d0.`` and ``d1.`` with their inputs in common, gates, and the denoiser of each evaluation."""
    parts = [random_graph(rng) for _ in range(2)]
    values: dict[str, Value] = {}
    blocks: list[Block] = []
    costs: list[int] = []
    for place, part in enumerate(parts):

        def named(name: str, place=place, part=part) -> str:
            return name if name in part.inputs else f"d{place}.{name}"

        for value in part.values.values():
            work = frozenset(len(costs) + node for node in value.work)
            reads = frozenset(map(named, value.reads))
            values[named(value.name)] = Value(named(value.name), value.nbytes, reads, work)
        for block in part.blocks:
            outputs, inputs = tuple(map(named, block.outputs)), tuple(map(named, block.inputs))
            blocks.append(Block(named(block.name), outputs, block.cache, inputs))
        costs += part.costs
    predictions = tuple(f"d{place}.{part.predictions[0]}" for place, part in enumerate(parts))
    graph = BlockGraph(parts[0].inputs, values, tuple(blocks), predictions, tuple(costs))
    denoisers = [rng.randint(0, 1) for _ in range(rng.randint(2, 8))]
    if rng.random() < 0.5:
        denoisers.sort()
    gates = [[rng.random() < 0.5 for _ in blocks] for _ in denoisers]
    for denoiser in {*denoisers} if rng.random() < 0.9 else ():
        gates[denoisers.index(denoiser)] = [True] * len(blocks)
    return graph, gates, denoisers


def random_graph(rng: random.Random) -> BlockGraph:
    """A block graph of one of three looks: any DAG, a UNet with skips, a chain; caches of both kinds mixed."""
    look = rng.choice(["dag", "dag", "unet", "chain"])
    residuals = rng.choice([0, 0.5, 1])
    inputs = {"stack": "step", "text": "constant"}
    values: dict[str, Value] = {}
    blocks: list[Block] = []
    count = rng.randint(1, 5)

    def add(name: str, reads: list[str]) -> str:
        work = frozenset({len(values)} | {rng.randint(0, 3) for _ in range(rng.randint(0, 2))})
        values[name] = Value(name, rng.randint(1, 6), frozenset(reads), work)
        return name

    def some(pool: list[str], most: int = 3) -> list[str]:
        return [rng.choice(pool) for _ in range(rng.randint(1, most))]

    hidden = add("embed", some(list(inputs)) if look == "dag" else ["stack"])
    skips: list[str] = []
    for k in range(count):
        pool = [*inputs, *values]
        residual = rng.random() < residuals
        outputs: list[str] = []
        sources: list[str] = []
        down = look == "unet" and k < count // 2
        for j in range(1 if look == "chain" else rng.randint(1, 3)):
            if look == "dag":
                reads = some(pool)
            elif look == "chain":
                reads = [hidden, rng.choice(["text", hidden])]
            else:
                reads = [hidden, *(skips[-2:] if not down else [])]
            if residual:
                origin = rng.choice([v for v in pool if v in values]) if look == "dag" else hidden
                if look == "dag" and rng.random() < 0.4:
                    origin = add(f"b{k}/in{j}", some(pool))
                sources.append(origin)
                reads = [*reads, origin] if rng.random() < 0.85 else reads
            if outputs and rng.random() < 0.5:
                reads.append(rng.choice(outputs))
            outputs.append(add(f"b{k}/out{j}", reads))
        if down:
            skips += outputs
        elif look == "unet":
            del skips[-2:]
        hidden = outputs[-1]
        blocks.append(Block(f"b{k}", tuple(outputs), "residual" if residual else "output", tuple(sources)))
    prediction = hidden
    if rng.random() < 0.95:
        extra = some(["stack", *values]) if look == "dag" or rng.random() < 0.2 else []
        prediction = add("noise_pred", [hidden, *extra])
    return BlockGraph(inputs, values, tuple(blocks), (prediction,), tuple(range(1, len(values) + 4)))


def random_gates(rng: random.Random, steps: int, blocks: int) -> list[list[bool]]:
    density = rng.choice([0.1, 0.3, 0.5, 0.8, 1])
    gates = [[rng.random() < density for _ in range(blocks)] for _ in range(steps)]
    if rng.random() < 0.8:
        gates[0] = [True] * blocks
    return gates


@dataclass(frozen=True)
class Traced:
    """A block graph with the nodes that it was read off."""

    graph: BlockGraph
    nodes: NodeGraph

    @property
    def makers(self) -> dict[str, Node]:
        return {name: node for node in self.nodes.nodes for name in node.outputs}


def evaluate(traced: Traced, name: str, known: dict[str, int], given: Callable[[str], int | None]) -> int:
    """A tensor from its node; ``given`` may know it better (a graph input, a cache), None where it does not."""
    if name not in known:
        value = given(name)
        if value is None:
            node = traced.makers[name]
            value = compute(name, [evaluate(traced, read, known, given) for read in node.inputs])
        known[name] = value
    return known[name]


def expand(rng: random.Random, graph: BlockGraph) -> Traced:
    """Nodes for the values of ``graph``: the values' own, and unnamed ones in between that several values share."""
    nodes: list[Node] = []
    tensors: dict[str, Tensor] = {}
    weights: dict[str, int] = {}
    pool: list[str] = []
    denoiser_of: dict[str, str] = {}  # of the tensors that only one of several denoisers may read
    style = rng.choice(["plain", "shared", "wild"])

    def add(name: str, reads: list[str], nbytes: int, *, extra: bool = False, passable: bool = True) -> None:
        used = []
        if rng.random() < 0.7:
            used.append(f"w{len(weights)}")
            weights[used[-1]] = rng.choice([8, BIG, BIG])
        outputs = (name, f"{name}/twin") if extra else (name,)
        nodes.append(Node(tuple(reads), outputs, rng.choice([0, rng.randint(0, 40)]), frozenset(used)))
        of = next((found for read in reads if (found := denoiser_of.get(read))), name[:3] if name[2:3] == "." else "")
        for output in outputs:
            tensors[output] = Tensor(f"k{nbytes}", nbytes, passable)
            denoiser_of[output] = of
        pool.extend(outputs[1:])

    source = residual_source(graph)
    for name, value in graph.values.items():
        # What is added has one shape, and so have a prediction and the guided one.
        if (alike := source.get(name, graph.guides.get(name))) is not None:
            value = replace(value, nbytes=tensors[alike].nbytes)
        reads = sorted(value.reads)

        def open_to(names: list[str], name: str = name) -> list[str]:
            return [
                other for other in names if denoiser_of.get(other, "") in ("", name[:3] if name[2:3] == "." else "")
            ]

        if style != "plain":
            for _ in range(rng.randint(0, 2)):
                seen = open_to([*graph.inputs, *pool, *(n for n in graph.values if n in tensors)])
                if style == "shared":
                    seen = open_to([*graph.inputs, *pool[:2]])
                constant = style == "wild" and rng.random() < 0.2
                unnamed = f"t{len(tensors)}"
                sources = [] if constant else [rng.choice(seen) for _ in range(rng.randint(1, 2))]
                add(unnamed, sources, rng.randint(1, 3), passable=rng.random() < 0.85)
                pool.append(unnamed)
            reads += [rng.choice(open_to(pool)) for _ in range(rng.randint(0, 2)) if open_to(pool)]
        add(name, reads, value.nbytes, extra=style == "wild" and rng.random() < 0.15)
    made = NodeGraph(tuple(nodes), tensors, weights)
    return read_off(made, graph)


def read_off(nodes: NodeGraph, graph: BlockGraph) -> Traced:
    """``graph`` with what its values read and cost according to the nodes."""
    maker = {name: place for place, node in enumerate(nodes.nodes) for name in node.outputs}
    values = {}
    for name, value in graph.values.items():
        reads: set[str] = set()
        work: set[int] = set()
        pending = [maker[name]]
        while pending:
            place = pending.pop()
            if place in work:
                continue
            work.add(place)
            for read in nodes.nodes[place].inputs:
                if read in graph.values or read in graph.inputs:
                    reads.add(read)
                else:
                    pending.append(maker[read])
        values[name] = replace(value, nbytes=nodes.tensors[name].nbytes, reads=frozenset(reads), work=frozenset(work))
    return Traced(replace(graph, values=values, costs=tuple(node.macs for node in nodes.nodes)), nodes)


def supernet(
    traced: Traced,
    gates: Sequence[Sequence[bool]],
    forecast: Forecast | None = None,
    denoisers: Sequence[int] | None = None,
    shares: Sequence[float] | None = None,
    half: str | None = None,
) -> list[int | None]:
    """Predictions by the definition: kept blocks compute and store, removed ones read. None: a store was missing.

    denoisers: of each evaluation, of ``random_turns``; with ``shares``, of ``random_halves``, that of the guidance.
    half: of guidance, of ``with_guide``, with the ``shares``; the unconditional one has no others than guided ones.
    """
    graph = traced.graph
    owner = {output: k for k, block in enumerate(graph.blocks) for output in block.outputs}
    source = residual_source(graph)
    store = Kept(forecast)
    alone: dict[str, int] = {}  # the last conditional-only evaluation that stored it
    predictions: list[int | None] = []

    class Missing(Exception):
        pass

    for step, row in enumerate(gates):
        known: dict[str, int] = {}

        def given(name: str, step=step, row=row, known=known) -> int | None:
            if name in graph.inputs:
                return graph_input(graph, name, step, half)
            if name not in owner or row[owner[name]]:
                return None
            since = -1 if shares is None or shares[step] == 0 else alone.get(name, -1)
            found = store.read(name, step, owner[name] % len(graph.schedule_blocks), since)
            if found is None:
                raise Missing
            base = evaluate(traced, source[name], known, given) if name in source else 0
            return (base + found) % PRIME

        if half == "unconditional" and shares is not None and shares[step] == 0:
            for block, kept in zip(graph.blocks, row, strict=True):
                for output in block.outputs if kept else ():
                    store.hide(output, step)
            predictions.append(None)
            continue
        fresh: dict[str, int | None] = {}
        for block, kept in zip(graph.blocks, row, strict=True):
            for output in block.outputs if kept and is_run(block, denoisers, step) else ():
                try:
                    origin = evaluate(traced, source[output], known, given) if output in source else 0
                    fresh[output] = (evaluate(traced, output, known, given) - origin) % PRIME
                except Missing:
                    fresh[output] = None
        for output, made in fresh.items():
            store.store(output, step, made)
            is_alone = shares is not None and shares[step] == 0
            store_half(store, graph, output, step, made, alone=is_alone)
            if is_alone:
                alone[output] = step
        try:
            prediction = graph.predictions[0 if denoisers is None else denoisers[step]]
            made = evaluate(traced, prediction, known, given)
            plain = shares is None or half is not None or shares[step] == 0
            predictions.append(made if plain else compute(f"*{shares[step]}", [made]))
        except Missing:
            predictions.append(None)
    return predictions

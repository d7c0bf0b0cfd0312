"""The denoising loop: a list of launches whose tensors are bound once; a run only walks the list."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

import numpy as np

from dipgo_deploy.backends.base import ALIGNMENT, Backend, Launchable, Memory
from dipgo_deploy.backends.storage import aligned_rows, to_storage
from dipgo_deploy.bundle.directory import Bundle
from dipgo_deploy.bundle.history import final_latent, graph_coefficients
from dipgo_deploy.bundle.manifest import Graph, LaunchEntry, Manifest, TensorSpec, VariantEntry
from dipgo_deploy.bundle.names import (
    COEFFICIENTS,
    FORECAST,
    GUIDANCE_SCALES,
    HISTORY,
    HISTORY_BEFORE,
    PREDICTION,
    TIMESTEP,
)
from dipgo_deploy.bundle.shapes import Sizes
from dipgo_deploy.bundle.tables import Tables
from dipgo_deploy.errors import UserError
from dipgo_deploy.plan.buffers import aligned
from dipgo_deploy.runtime.component import MOST_SIZES
from dipgo_deploy.runtime.graphs import Graphs
from dipgo_deploy.runtime.run_rows import RunRows, rows_of
from dipgo_deploy.schedule.guidance import share_of_scale

# All bits set is NaN in float32, float16 and bfloat16.
_POISON_BYTE = 0xFF
# Not NaN: the weighted sum multiplies unwritten slots by zero, which must stay zero.
_POISON_PREDICTION = np.float32(1e30)


class _View:
    """The loop at one choice of sizes: every shape is known.

    Attributes:
        sample_shape: (B, C, h, w).
        start: the history before a run, on the host; a run puts in its noise and its picture and leaves the rest.
        tensors: where each input and output of each launch lives.
        calls: launches, once bound.
    """

    def __init__(self, manifest: Manifest, unwritten: np.float32) -> None:
        plan, latent = manifest.plan, manifest.latent
        self.manifest = manifest
        self.sample_shape = (manifest.batch, *latent.shape)
        self.history = TensorSpec(name=HISTORY, shape=(plan.slots, *self.sample_shape), dtype="float32")
        self.noises = TensorSpec(name="noises", shape=(plan.noises, *self.sample_shape), dtype="float32")
        self.start = np.full(self.history.shape, unwritten)
        self.tensors: tuple[dict[str, Memory], ...] = ()
        self.calls: list[Launchable | None] = [None] * len(plan.launches)

    def graph(self, launch: LaunchEntry) -> Graph:
        """What a launch runs, with its shapes."""
        return self.manifest.plan.variants[launch.variant].graph


class DenoisingLoop:
    """The launches of an engine directory, bound to one set of buffers on a backend; one or several an evaluation.

    Buffers: the history float32 (slots, B, C, h, w), with zeros in front of it; coefficients, one row of ``slots``
    float32 per launch; timesteps, one float32 per launch; rows of tables and of what is made at the start of a run,
    where graphs take some; weights of stored values, where a launch has some; the guidance scales; the conditions; the
    cache arena. A prediction is bound to its slot of the history and a cache to its offset in the arena, so nothing is
    copied between launches. One run at a time.

    Where sizes are open the buffers are made for the largest, and each run is of the sizes of its noise: the launches
    are bound anew for sizes that were not among the last few.

    Args:
        bundle: the engine directory.
        backend: what runs its graphs.
        poison: for tests: before each run fill the arena with NaN and the prediction slots with 1e30, so that a read
            of anything this run has not written shows in the result.
        lazy: load each variant's graph at its first launch, not now.
        graphs: on the same backend, what is loaded already; what this loop loads goes in, too.

    Raises:
        UserError: the backend cannot run the directory, a graph cannot be loaded, or the manifest contradicts itself.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        *,
        poison: bool = False,
        lazy: bool = False,
        graphs: Graphs | None = None,
    ) -> None:
        manifest = bundle.manifest
        backend.check(manifest)
        plan = manifest.plan
        self.bundle = bundle
        self._backend = backend
        self._poison = poison
        self.launches: tuple[LaunchEntry, ...] = plan.launches
        self._unwritten = _POISON_PREDICTION if poison else np.float32(0)
        self._view = _View(manifest, self._unwritten)  # of the last run; before the first one, of the largest sizes
        self.sample_shape = self._view.sample_shape
        # Zeros in front of the history: what comes before its first slot, at any sizes.
        zeros = aligned(self._view.history.nbytes // plan.slots, ALIGNMENT)
        room = backend.allocate(zeros + self._view.history.nbytes)
        self._history = room.at(zeros, self._view.history.nbytes)
        self._room, self._zeros = room, zeros
        self._coefficients = _upload_rows(
            backend, [graph_coefficients(launch.coefficients, plan.history.chain) for launch in plan.launches]
        )
        self._timesteps = _upload_rows(backend, [(launch.timestep,) for launch in plan.launches])
        tables = Tables(bundle)
        self._tables = _upload_tables(backend, tables, plan.launches)
        forecasts = [launch.forecast for launch in plan.launches]
        self._forecasts = _upload_rows(backend, forecasts) if any(forecasts) else ()
        # One for each share of the guidance; what takes none may be given any.
        shares = {1.0, *(launch.guidance for launch in plan.launches)}
        self._guidance_scales = {share: {name: backend.allocate(4) for name in GUIDANCE_SCALES} for share in shares}
        self._conditions = {spec.name: backend.allocate(spec.nbytes) for spec in manifest.conditions}
        self._arena = backend.allocate(plan.arena_bytes)
        self._graphs = Graphs(backend) if graphs is None else graphs
        bound = {**self._guidance_scales[1.0], **self._conditions}
        self._run_rows = RunRows(bundle, backend, tables, bound, self._graphs)
        self._views = {self.sample_shape: self._view}
        self._place(self._view)
        if not lazy:
            self.load()

    def load(self) -> None:
        """Load every graph and bind every launch, where not done yet.

        Raises:
            UserError: a graph cannot be loaded.
        """
        for index in range(len(self.launches)):
            self._ready(index)
        self._run_rows.load()

    def _ready(self, index: int) -> Launchable:
        """Launch ``index``, its graph loaded and its tensors bound."""
        view = self._view
        call = view.calls[index]
        if call is None:
            launch = self.launches[index]
            graph = view.graph(launch)
            executable = self._graphs.get(self.bundle, graph)
            tensors = view.tensors[index]
            call = executable.bind(tensors) if graph.sizes is None else executable.bind(tensors, graph)
            view.calls[index] = call
        return call

    def _at(self, noise: np.ndarray) -> _View:
        """The view for the shape of ``noise``; raises ValueError or UserError for one that it cannot have."""
        manifest = self.bundle.manifest
        fixed = manifest.latent.shape[:-2]  # all but height and width
        if manifest.sizes is None or noise.ndim != len(fixed) + 3 or noise.shape[1:-2] != fixed:
            _with_shape("noise", noise, self.sample_shape)
            return self._view
        view = self._views.pop(noise.shape, None)
        if view is None:
            view = _View(manifest.at(Sizes(len(noise), *noise.shape[-2:])), self._unwritten)
            self._place(view)
        while len(self._views) >= MOST_SIZES:
            del self._views[next(iter(self._views))]
        self._views[view.sample_shape] = self._view = view
        return view

    def _place(self, view: _View) -> None:
        rows = self._run_rows.at(view.manifest)
        view.tensors = tuple(
            self._tensors_of(view, index, launch, rows(launch)) for index, launch in enumerate(self.launches)
        )

    def _tensors_of(
        self, view: _View, index: int, launch: LaunchEntry, run_rows: Mapping[str, Memory]
    ) -> dict[str, Memory]:
        """Where each input and output of a launch lives. run_rows: what it may take of the rows of the run."""
        plan = view.manifest.plan
        variant = plan.variants[launch.variant]
        specs = {spec.name: spec for spec in (*variant.graph.inputs, *variant.graph.outputs)}
        tensors: dict[str, Memory] = {
            HISTORY: self._history,
            HISTORY_BEFORE: self._room.at(self._zeros - view.history.nbytes // plan.slots, view.history.nbytes),
            COEFFICIENTS: self._coefficients[index],
            TIMESTEP: self._timesteps[index],
            **self._guidance_scales[launch.guidance],
            **{
                name: rows_of(memory, specs[name], launch.half)
                for name, memory in self._conditions.items()
                if name in specs
            },
            **(self._tables[index] if self._tables else {}),
            **run_rows,
        }
        if launch.forecast:
            tensors[FORECAST] = self._forecasts[index]
        try:
            if HISTORY in specs and len(launch.coefficients) != plan.slots:
                raise ValueError(f"{len(launch.coefficients)} coefficients for {plan.slots} slots")
            if launch.slot is not None:
                slot_bytes = view.history.nbytes // plan.slots
                tensors[PREDICTION] = self._history.at(launch.slot * slot_bytes, slot_bytes)
            elif launch.passes is not None:
                tensors[PREDICTION] = self._arena.at(launch.passes, specs[PREDICTION].nbytes)
            caches = [*zip(variant.reads, launch.reads, strict=True), *zip(variant.writes, launch.writes, strict=True)]
            for name, offset in caches:
                tensors[name] = self._arena.at(offset, specs[name].nbytes)
            return {name: tensors[name].at(0, spec.nbytes) for name, spec in specs.items()}
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{self.bundle.path}: manifest, launch {index} ({variant.name}): {error}; export it again"
            ) from None

    def run(
        self,
        noise: np.ndarray,
        conditions: Mapping[str, np.ndarray],
        *,
        noises: np.ndarray | None = None,
        image: np.ndarray | None = None,
        guidance_scale: float | Sequence[float] = 1.0,
        on_launch: Callable[[int], None] | None = None,
        count: int | None = None,
    ) -> np.ndarray:
        """Denoise one batch.

        Args:
            noise: initial latent, raw unit noise (B, C, h, w); where sizes are open, it says what they are.
            conditions: each condition input of the manifest by name, with its shape.
            noises: the sampler's noise draws (M, B, C, h, w); may be None when M is 0.
            image: latents of the picture (B, C, h, w) that a run for image-to-image starts from.
            guidance_scale: ignored by a bundle without guidance; several: one for each of the model's denoisers.
            on_launch: called with the index of each launch after it was enqueued.
            count: launches that are run, all by default; with fewer only the history is of any account.

        Returns:
            The final latent, float32 (B, C, h, w).

        Raises:
            ValueError: an array has the wrong shape, or a condition is missing.
            UserError: sizes outside the ranges, or the backend failed in a launch; the message names the graph.
        """
        walk = self.start(noise, conditions, noises=noises, image=image, guidance_scale=guidance_scale)
        for index in islice(walk, count):
            if on_launch is not None:
                on_launch(index)
        self._backend.synchronize()
        return final_latent(self.history(), self._view.manifest.plan.final)

    def start(
        self,
        noise: np.ndarray,
        conditions: Mapping[str, np.ndarray],
        *,
        noises: np.ndarray | None = None,
        image: np.ndarray | None = None,
        guidance_scale: float | Sequence[float] = 1.0,
    ) -> Iterator[int]:
        """Begin a run that the caller walks through: each launch is enqueued when it is asked for, and its index given.

        The next run of this loop, or the next call of this, ends it. Arguments and errors as ``run``.
        """
        view = self._at(noise)
        self._begin(view, noise, conditions, noises, image, guidance_scale)
        return self._walk(view)

    def _walk(self, view: _View) -> Iterator[int]:
        for index, call in enumerate(view.calls):
            (call or self._ready(index))()
            yield index

    def _begin(
        self,
        view: _View,
        noise: np.ndarray,
        conditions: Mapping[str, np.ndarray],
        noises: np.ndarray | None,
        image: np.ndarray | None,
        guidance_scale: float | Sequence[float],
    ) -> None:
        """Put everything in its place that a run is given."""
        plan = view.manifest.plan
        noises = np.zeros(view.noises.shape, np.float32) if noises is None and not plan.noises else noises
        history = view.start  # all of it is uploaded: that also clears what the run before left
        if self._poison:
            self._backend.upload(self._arena, np.full(plan.arena_bytes, _POISON_BYTE, np.uint8))
        history[0] = noise
        history[plan.slots - plan.noises :] = _with_shape("noises", noises, view.noises.shape)
        if plan.image_slot is not None:
            history[plan.image_slot] = _with_shape("image", image, view.sample_shape)
        self._backend.upload(self._history, history)
        count = max(1, len(view.manifest.model.denoisers))
        given = guidance_scale if isinstance(guidance_scale, Sequence) else [guidance_scale] * count
        scales = {name: float(scale) for name, scale in zip(GUIDANCE_SCALES[:count], given, strict=True)}
        off = view.manifest.guidance_off
        for share, memory in self._guidance_scales.items():
            for name, scale in scales.items():
                own = share_of_scale(scale, share, off)
                self._backend.upload(memory[name], np.array([own], np.float32))
        for spec in view.manifest.conditions:
            array = _with_shape(spec.name, conditions.get(spec.name), spec.shape)
            self._backend.upload(self._conditions[spec.name], to_storage(array, spec.dtype))
        self._run_rows.fill(view.manifest, conditions, scales)

    def history(self) -> np.ndarray:
        """The history after a run, float32 (slots, B, C, h, w): it holds only until the next one."""
        return self._backend.download(self._history, self._view.history, copy=False)

    def latents_after(self, index: int) -> np.ndarray:
        """What the first launch after ``index`` that takes the latent gets, or the final latent, float32 (B, C, [f,] h,
        w): call it from ``on_launch``."""
        self._backend.synchronize()
        following = (launch.coefficients for launch in self.launches[index + 1 :] if launch.coefficients)
        return final_latent(self.history(), next(following, self._view.manifest.plan.final))

    def evaluate(
        self,
        step: int,
        latent: np.ndarray,
        conditions: Mapping[str, np.ndarray],
        *,
        timestep: float,
        guidance_scale: float | Sequence[float] = 1.0,
        arena: np.ndarray | None = None,
    ) -> tuple[np.ndarray | None, np.ndarray]:
        """The launches of one evaluation alone, from a latent of the caller's.

        Args:
            step: which evaluation.
            latent: the model input, float32 (B, C, h, w).
            conditions, guidance_scale: as for ``run``.
            timestep: what the denoiser is told.
            arena: the arena as an earlier evaluation left it, uint8 (bytes,); None before the first one.

        Returns:
            The prediction, float32 (B, C, h, w), None where the evaluation has none, and the arena after it.

        Raises:
            ValueError, UserError: as ``run``.
        """
        view = self._at(latent)
        plan = view.manifest.plan
        # The latent in the place of the initial noise, and the sum of the history is that slot alone.
        image = None if plan.image_slot is None else np.zeros(view.sample_shape, np.float32)
        self._begin(view, latent, conditions, np.zeros(view.noises.shape, np.float32), image, guidance_scale)
        if arena is not None:
            self._backend.upload(self._arena, arena)
        alone = graph_coefficients([1.0] + [0.0] * (plan.slots - 1), plan.history.chain)
        prediction = None
        for index, launch in enumerate(self.launches):
            if launch.step != step:
                continue
            if (self._tables or self._run_rows.timed) and timestep != launch.timestep:
                raise UserError(
                    f"{self.bundle.path}: evaluation {step} has tables for the timestep {launch.timestep}, not "
                    f"{timestep}; export the engine directory again with --no-timestep-tables"
                )
            self._tell(index, alone, timestep)
            self._ready(index)()
            self._backend.synchronize()
            self._tell(index, graph_coefficients(launch.coefficients, plan.history.chain), launch.timestep)
            if launch.slot is not None:
                slot_bytes = view.history.nbytes // plan.slots
                spec = TensorSpec(name=PREDICTION, shape=view.sample_shape, dtype="float32")
                prediction = self._backend.download(self._history.at(launch.slot * slot_bytes, slot_bytes), spec)
        whole = TensorSpec(name="arena", shape=(plan.arena_bytes // 8,), dtype="int64")  # bytes, eight at a time
        return prediction, self._backend.download(self._arena, whole).view(np.uint8)

    def _tell(self, index: int, coefficients: np.ndarray, timestep: float) -> None:
        if self.launches[index].coefficients:
            self._backend.upload(self._coefficients[index], coefficients)
        self._backend.upload(self._timesteps[index], np.array([timestep], np.float32))

    def not_finite(self) -> str | None:
        """The first launch of the last run whose prediction was not finite, in words; None where all were."""
        plan = self._view.manifest.plan
        history = self.history()
        for index, launch in enumerate(self.launches):
            if launch.slot is not None and not np.isfinite(history[launch.slot]).all():
                name = plan.variants[launch.variant].name
                return f"launch {index + 1} of {len(self.launches)} (evaluation {launch.step}, graph {name})"
        return None

    def variant(self, index: int) -> VariantEntry:
        """The variant that launch ``index`` runs."""
        return self.bundle.manifest.plan.variants[self.launches[index].variant]

    def fetch(self, index: int, name: str) -> np.ndarray:
        """An input or output of launch ``index`` as it is in memory now: call it from ``on_launch``.

        Raises:
            KeyError: the launch has no tensor of that name.
        """
        graph = self._view.graph(self.launches[index])
        spec = {spec.name: spec for spec in (*graph.inputs, *graph.outputs)}[name]
        self._backend.synchronize()
        return self._backend.download(self._view.tensors[index][name], spec)


def _upload_rows(backend: Backend, rows: Sequence[Sequence[float] | np.ndarray]) -> tuple[Memory, ...]:
    """One allocation for all rows (float32), each at an aligned address."""
    row_bytes = 4 * max((len(row) for row in rows), default=0)
    stride = aligned(row_bytes, ALIGNMENT)
    table = np.zeros((len(rows), stride // 4), np.float32)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    memory = backend.allocate(table.nbytes)
    backend.upload(memory, table)
    return tuple(memory.at(index * stride, row_bytes) for index in range(len(rows)))


def _upload_tables(
    backend: Backend, tables: Tables, launches: Sequence[LaunchEntry]
) -> tuple[Mapping[str, Memory], ...]:
    """Of each launch the rows that its graph may take, by input; empty without tables. Each table is one allocation."""
    if not tables.rows:
        return ()
    placed: dict[str, tuple[Memory, int]] = {}
    for name, rows in tables.rows.items():
        table = aligned_rows(rows, tables.specs[name].dtype, ALIGNMENT)
        placed[name] = backend.allocate(table.nbytes), table.shape[1]
        backend.upload(placed[name][0], table)
    return tuple(
        {
            name: memory.at(tables.row(launch.timestep) * stride, tables.specs[name].nbytes)
            for name, (memory, stride) in placed.items()
        }
        if tables.has(launch.timestep)
        else {}
        for launch in launches
    )


def _with_shape(name: str, array: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    if array is None:
        raise ValueError(f"{name}: missing, needs shape {shape}")
    if array.shape != shape:
        raise ValueError(f"{name}: shape {array.shape}, needs {shape}")
    return array

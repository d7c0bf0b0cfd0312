"""All that a server does but HTTP: models by name, and requests in their lanes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from dipgo_deploy.errors import UserError
from dipgo_deploy.serve.engine import Drawn, Engine, Wanted
from dipgo_deploy.serve.lane import Lane, Ticket
from dipgo_deploy.serve.metrics import Metrics
from dipgo_deploy.serve.schemas import GenerationRequest, ModelEntry
from dipgo_deploy.serve.settings import Settings

PictureLane = Lane[Wanted, Drawn]


class UnknownModel(UserError):
    """A request for a model that is not served here."""


@dataclass(frozen=True)
class Submitted:
    """A request in its lane."""

    model: str
    lane: PictureLane
    ticket: Ticket[Wanted, Drawn]

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self.lane.cancel(self.ticket)


class Service:
    """Engines, each with a lane."""

    def __init__(self, engines: list[Engine], settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self._created = int(time.time())
        self._engines = {engine.name: engine for engine in engines}
        self._lanes: dict[str, PictureLane] = {engine.name: self._lane(engine) for engine in engines}
        for lane in self._lanes.values():
            self.metrics.watch(lane)

    def _lane(self, engine: Engine) -> PictureLane:
        return Lane(
            engine.name,
            engine.draw,
            prepare=engine.load,
            batch=engine.batch,
            window=self.settings.window,
            most=self.settings.max_queue,
            record=lambda record: self.metrics.batch(engine.name, record),
        )

    def start(self) -> None:
        """Begin to load."""
        for lane in self._lanes.values():
            lane.start()

    def stop(self) -> None:
        """Take no more requests."""
        for lane in self._lanes.values():
            lane.stop()

    def join(self, timeout: float | None = None) -> bool:
        """Wait until all that was taken is drawn, after ``stop``; whether it was, within so many seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        return all(
            [lane.join(None if end is None else max(0.0, end - time.monotonic())) for lane in self._lanes.values()]
        )

    @property
    def states(self) -> dict[str, str]:
        """Of each lane."""
        return {name: lane.state for name, lane in self._lanes.items()}

    @property
    def state(self) -> Literal["ready", "not ready", "failed"]:
        """Of all together."""
        states = set(self.states.values())
        return "failed" if "failed" in states else "ready" if states == {"ready"} else "not ready"

    def models(self) -> list[ModelEntry]:
        """Every directory, and every schedule of those with several."""
        found = []
        for engine in self._engines.values():
            several = len(engine.manifests) > 1
            for place, (schedule, manifest) in enumerate(engine.manifests.items()):
                names = [engine.name] if not place else []
                names += [f"{engine.name}:{schedule}"] if several else []
                found += [
                    ModelEntry(
                        id=name,
                        created=self._created,
                        architecture=manifest.model.name,
                        schedule=schedule,
                        num_inference_steps=manifest.sampler.num_inference_steps,
                        launches=len(manifest.plan.launched),
                        batch=manifest.batch,
                    )
                    for name in names
                ]
        return found

    def submit(self, asked: GenerationRequest) -> Submitted:
        """Check a request and put it into its lane.

        Raises:
            UserError: it does not fit the engine directory, or (``UnknownModel``) asks for one that is not here.
            Busy: it is not taken now.
        """
        engine, asked = self._chosen(asked)
        most = min(self.settings.max_images, self.settings.max_queue)
        if asked.n > most:
            raise UserError(f"n: {asked.n}, and this server draws at most {most} for a request")
        wanted = engine.wanted(asked)
        lane = self._lanes[engine.name]
        return Submitted(engine.name, lane, lane.submit(wanted, [one.key for one in wanted]))

    def _chosen(self, asked: GenerationRequest) -> tuple[Engine, GenerationRequest]:
        """The engine of a request, and the request with the schedule that its ``model`` names."""
        if asked.model is None:
            if len(self._engines) > 1:
                raise UserError(f"model: missing; this server has {', '.join(self._engines)}")
            return next(iter(self._engines.values())), asked
        name, colon, schedule = asked.model.partition(":")
        if name not in self._engines:
            raise UnknownModel(f"model: no {name!r} here; this server has {', '.join(self._engines)}")
        engine = self._engines[name]
        if not colon:
            return engine, asked
        if asked.schedule is not None or asked.launches is not None:
            raise UserError(f"model {asked.model!r} names a schedule: leave out schedule and launches")
        if schedule not in engine.manifests:
            raise UnknownModel(f"model: no {asked.model!r} here; see /v1/models")
        return engine, asked.model_copy(update={"schedule": schedule})

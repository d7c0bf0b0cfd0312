"""How far a build is, from the nested phases that TensorRT reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class _Phase:
    steps: int
    parent: str | None
    done: int = 0
    inner: float = 0.0  # progress of the phase that runs inside the current step

    @property
    def fraction(self) -> float:
        return min((self.done + self.inner) / max(self.steps, 1), 1.0)


class Phases:
    """Nested phases as one number. Phases of unknown parents count as outermost ones."""

    def __init__(self) -> None:
        self._phases: dict[str, _Phase] = {}
        self._best = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase of so many steps began, inside the current step of ``parent``."""
        self._phases[name] = _Phase(steps, parent)

    def step(self, name: str, index: int) -> None:
        """Step ``index`` (0-based) of a phase is done."""
        phase = self._phases.get(name)
        if phase is None:
            return
        phase.done, phase.inner = index + 1, 0.0
        self._pass_on(phase)

    def finish(self, name: str) -> None:
        """A phase is over."""
        self._phases.pop(name, None)

    @property
    def fraction(self) -> float:
        """0 to 1; never goes back."""
        return self._best

    def _pass_on(self, phase: _Phase) -> None:
        parent = self._phases.get(phase.parent or "")
        if parent is not None:
            parent.inner = phase.fraction
            self._pass_on(parent)
        else:
            self._best = max(self._best, phase.fraction)

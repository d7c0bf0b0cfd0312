"""What became of one document, and whether that is a fault."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

MIB = 2**20
REFUSED_SECONDS = 5.0
REFUSED_BYTES = 500 * MIB
# Longer than any message of one line should be.
MAX_LINE = 2000


class Verdict(StrEnum):
    """What became of a document. Those from ``UNTIDY`` on are faults."""

    REFUSED = "refused"
    SAME = "same"
    SAID = "said"
    VALID = "valid"
    UNTIDY = "untidy"
    TRACEBACK = "traceback"
    DIED = "died"
    HANG = "hang"
    SILENT = "silent"

    @property
    def fault(self) -> bool:
        """Whether the project promises that this does not happen."""
        return self in (Verdict.UNTIDY, Verdict.TRACEBACK, Verdict.DIED, Verdict.HANG, Verdict.SILENT)


MEANING = {
    Verdict.REFUSED: "one `error:` line and exit status 1 or 2",
    Verdict.SAME: "accepted, and the result is that of the document before it was changed",
    Verdict.SAID: "accepted with another result, and a line says what is different",
    Verdict.VALID: "accepted with another result that is what the document says: another valid document",
    Verdict.UNTIDY: "refused, but not in one line",
    Verdict.TRACEBACK: "an exception that nobody caught",
    Verdict.DIED: "the process was gone: a signal, an abort, or out of memory",
    Verdict.HANG: "no end within the limit",
    Verdict.SILENT: "accepted, and another result without a word",
}


@dataclass(frozen=True)
class Ran:
    """One run of a command: exit status (None: it raised, ``traceback`` says what), what it printed, seconds of
    processor time, and bytes of memory beyond those before. ``left``: files that it should not have left."""

    status: int | None
    out: str = ""
    err: str = ""
    traceback: str = ""
    seconds: float = 0.0
    memory: int = 0
    left: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """The verdict on one document. ``index``: of its kind, for the seed. ``detail``: what is to be seen of it.
    ``marks``: what else is to be counted."""

    kind: str
    index: int
    label: str
    verdict: Verdict
    detail: str = ""
    seconds: float = 0.0
    memory: int = 0
    left: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()

    @property
    def slow(self) -> bool:
        """A refusal that took too long."""
        return self.verdict is Verdict.REFUSED and self.seconds > REFUSED_SECONDS

    @property
    def heavy(self) -> bool:
        """A refusal that took too much memory."""
        return self.verdict is Verdict.REFUSED and self.memory > REFUSED_BYTES

    @property
    def fault(self) -> bool:
        """Whether anything of it breaks a promise."""
        return self.verdict.fault or self.slow or self.heavy or bool(self.left)

    def row(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Result:
        """What ``row`` made, read from JSON."""
        verdict, left, marks = Verdict(row["verdict"]), tuple(row["left"]), tuple(row["marks"])
        return cls(**{**row, "verdict": verdict, "left": left, "marks": marks})


def refusal(ran: Ran) -> tuple[Verdict, str]:
    """The verdict on a run that did not end with exit status 0."""
    if ran.status is None or "Traceback (most recent call last)" in ran.err:
        return Verdict.TRACEBACK, ran.traceback or ran.err[-MAX_LINE:]
    lines = ran.err.strip("\n").split("\n")
    tidy = (
        ran.status in (1, 2)
        and len(lines) == 1
        and lines[0].startswith("error: ")
        and len(lines[0]) <= MAX_LINE
        and lines[0].isprintable()
    )
    return (Verdict.REFUSED if tidy else Verdict.UNTIDY), ran.err[:MAX_LINE] or f"exit status {ran.status}"

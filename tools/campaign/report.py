"""Counts of a campaign: one line for each kind, and what was found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tools.bench.measure import machine_line
from tools.bench.tables import table
from tools.campaign.verdict import MEANING, MIB, REFUSED_BYTES, REFUSED_SECONDS, Result, Verdict

# Faults that are shown of each kind.
_SHOWN = 5


class Counts:
    """What became of the documents of one kind."""

    def __init__(self, name: str, results: Iterable[Result] = ()) -> None:
        self.name = name
        self.verdicts: Counter[Verdict] = Counter()
        self.marks: Counter[str] = Counter()
        self.slow = self.heavy = self.leftovers = self.faulty = 0
        self.seconds = 0.0
        self.memory = 0
        self.faults: list[Result] = []
        for result in results:
            self.add(result)

    def add(self, result: Result) -> None:
        """Count one result."""
        self.verdicts[result.verdict] += 1
        self.marks.update(result.marks)
        self.slow += result.slow
        self.heavy += result.heavy
        self.leftovers += bool(result.left)
        self.seconds, self.memory = max(self.seconds, result.seconds), max(self.memory, result.memory)
        if result.fault:
            self.faulty += 1
            self.faults.append(result)

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "kind": self.name,
            "documents": self.verdicts.total(),
            **{verdict.value: self.verdicts[verdict] for verdict in Verdict},
            "marks": dict(sorted(self.marks.items())),
            "slow": self.slow,
            "heavy": self.heavy,
            "leftovers": self.leftovers,
            "worst_seconds": round(self.seconds, 2),
            "worst_mib": round(self.memory / MIB),
            "faults": self.faulty,
            "shown": [result.row() for result in self.faults[:_SHOWN]],
        }


def line(facts: Mapping[str, Any]) -> str:
    """One kind as one line."""
    counted = ", ".join(f"{facts[verdict.value]} {_words(verdict)}" for verdict in Verdict)
    rest = f"{facts['slow']} slow, {facts['heavy']} heavy, {facts['leftovers']} leftovers"
    worst = f"worst {facts['worst_seconds']:.1f} s, {facts['worst_mib']} MiB"
    marks = "".join(f"; {count} {mark}" for mark, count in facts["marks"].items())
    return f"{facts['kind']}: {facts['documents']} documents: {counted}; {rest}; {worst}{marks}"


def _words(verdict: Verdict) -> str:
    return {
        Verdict.REFUSED: "refused in one line",
        Verdict.SAME: "the same picture",
        Verdict.SAID: "a said difference",
        Verdict.VALID: "another valid document",
        Verdict.UNTIDY: "refused otherwise",
        Verdict.TRACEBACK: "tracebacks",
        Verdict.DIED: "died",
        Verdict.HANG: "hangs",
        Verdict.SILENT: "silent other results",
    }[verdict]


def page(facts: Mapping[str, Any]) -> str:
    """The page of a campaign, for readers."""
    kinds: Sequence[Mapping[str, Any]] = facts["kinds"]
    headings = ("kind", "documents", *Verdict, "slow", "heavy", "leftovers", "worst s", "worst MiB")
    rows = [
        (
            kind["kind"],
            str(kind["documents"]),
            *(str(kind[verdict.value]) for verdict in Verdict),
            *(str(kind[name]) for name in ("slow", "heavy", "leftovers")),
            f"{kind['worst_seconds']:.1f}",
            str(kind["worst_mib"]),
        )
        for kind in kinds
    ]
    words = "\n".join(
        f"- `{verdict.value}`: {MEANING[verdict]}{'' if not verdict.fault else ' (a fault)'}" for verdict in Verdict
    )
    return (
        "# Hostile and broken documents, byte flips and kills\n\n"
        f"{facts['command']}, seed {facts['seed']}, {facts['seconds']:.0f} s, version {facts['version']}; "
        f"{machine_line(facts['machine'])}.\n\n"
        f"{table(headings, rows)}\n"
        "A document is one that the project takes from outside, changed in one place by a seeded generator, and read "
        "by the command that reads it. A column each:\n\n"
        f"{words}\n"
        f"- `slow`, `heavy`: refused, but after more than {REFUSED_SECONDS:g} s of processor time, or with more than "
        f"{REFUSED_BYTES / MIB:.0f} MiB beyond what the process had (faults)\n"
        "- `leftovers`: files or processes were left that nobody asked for (a fault)\n"
        "- `worst s`, `worst MiB`: the most processor time and memory of all documents of the kind, accepted ones "
        "too; of kills, seconds from the signal to the end of the process\n\n"
        f"{_notes(kinds)}"
    )


def _notes(kinds: Iterable[Mapping[str, Any]]) -> str:
    marks = [f"{kind['kind']}: {count} {mark}." for kind in kinds for mark, count in kind["marks"].items()]
    text = ("\n".join(marks) + "\n\n") if marks else ""
    found = [(kind, fault) for kind in kinds for fault in kind["shown"]]
    if not found:
        return f"{text}No faults.\n"
    lines = []
    for kind, fault in found:
        detail = " ".join((fault["detail"].strip().splitlines() or [""])[-1].split())[:200]
        what = f"left {', '.join(fault['left'])}" if fault["left"] else fault["verdict"]
        where = f"{kind['kind']} {fault['index']}: {fault['label'][:120]!r}"
        lines.append(f"- {where}: {what}, {fault['seconds']:.1f} s, {fault['memory'] / MIB:.0f} MiB: {detail}")
    return f"{text}## Faults\n\nAt most {_SHOWN} of each kind are shown.\n\n" + "\n".join(lines) + "\n"

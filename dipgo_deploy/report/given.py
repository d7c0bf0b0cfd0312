"""What a report has besides the directory, and how it is read from files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dipgo_deploy.errors import UserError
from dipgo_deploy.report.measured import ComparedStep, Comparison, Limit, Profile, Quality, read_measured, sides
from dipgo_deploy.report.subject import Subject


@dataclass(frozen=True)
class Strip:
    """A picture of both directories from the same seed, (H, W, 3) in [0, 1]."""

    caption: str
    full: np.ndarray
    pruned: np.ndarray


@dataclass(frozen=True)
class Given:
    """What a report has besides the directory.

    Attributes:
        against: another directory, such as the full run's.
        profile, against_profile: their times.
        qualities: what ``dipgo-bench quality`` found.
        comparison: what ``dipgo-compare`` found.
        limit: what the machine can do.
        strips: pictures of both; ``no_pictures`` says why there are none.
        drift: how far the latents of both are apart where both launch, and at the end.
    """

    against: Subject | None = None
    profile: Profile | None = None
    against_profile: Profile | None = None
    qualities: Sequence[Quality] = ()
    comparison: Comparison | None = None
    limit: Limit | None = None
    strips: Sequence[Strip] = ()
    no_pictures: str = ""
    drift: Sequence[ComparedStep] = ()

    @property
    def speedup(self) -> float | None:
        """Of the loop, to the other directory's."""
        if self.profile is None or self.against_profile is None:
            return None
        return self.against_profile.loop_seconds / self.profile.loop_seconds


def read_given(subject: Subject, against: Subject | None, files: Sequence[Path]) -> Given:
    """The measurements in files, each put where it belongs.

    Raises:
        UserError: a file that is none, a profile of another directory, two of one kind where there is place for one, or
            ``against`` of another class of models.
    """
    ours, theirs = (None if one is None else one.bundle.manifest for one in (subject, against))
    assert ours is not None
    if against is not None and theirs is not None and theirs.model.class_name != ours.model.class_name:
        raise UserError(
            f"--against {against.bundle.path}: is of {theirs.model.class_name}, {subject.bundle.path} of "
            f"{ours.model.class_name}; give a directory of the same model"
        )
    profiles: list[tuple[Path, Profile]] = []
    qualities: list[Quality] = []
    comparison: Comparison | None = None
    limit: Limit | None = None
    for path in files:
        found = read_measured(path)
        if isinstance(found, Profile):
            profiles.append((path, found))
        elif isinstance(found, Quality):
            qualities.append(found)
        elif isinstance(found, Limit):
            if not found.fits(ours.plan):
                raise UserError(
                    f"{path}: its graphs are not those of {subject.bundle.path}; measure that, or leave it out"
                )
            limit = found
        elif comparison is None:
            comparison = found
        else:
            raise UserError(f"{path}: a second comparison; give one")
    other = None if against is None or theirs is None else (against.bundle.path, theirs.plan)
    ours_profile, their_profile = sides(profiles, (subject.bundle.path, ours.plan), other)
    return Given(
        against=against,
        profile=ours_profile,
        against_profile=their_profile,
        qualities=qualities,
        comparison=comparison,
        limit=limit,
        no_pictures="No pictures: give --against, the directory of the full run.",
    )

"""What a report has besides the directory, read from files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dipgo_deploy.errors import UserError
from dipgo_deploy.report.measured import Comparison, Limit, Profile, Quality, read_measured, sides
from dipgo_deploy.report.page import Given
from dipgo_deploy.report.subject import Subject


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

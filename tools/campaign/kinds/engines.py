"""Engine directories: their manifests changed with the seal as it was, and sealed anew by hand; bits of all other
files flipped. Run to pictures, which have to be those of the directory before.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from dipgo_deploy.bundle.directory import Bundle, reseal
from dipgo_deploy.errors import UserError
from tools.campaign.material import CLASS_RUN, TEXT_RUN, Material, link_tree, run_arguments
from tools.campaign.mutate import change_bytes, change_json, flip, pick
from tools.campaign.verdict import Ran, Verdict
from tools.campaign.worker import Trial

Name = Literal["class", "text"]

# What a run prints beside the two lines that every run prints.
_USUAL = (" image(s), ", "memory: ")


@dataclass(frozen=True)
class Sealed:
    """Manifest or schedule of a directory changed, and the seal as it was."""

    material: Material
    name: str = "manifests"

    def trial(self, random: np.random.Generator, folder: Path) -> Trial:
        """The class model's directory, or the text model's (one of eight)."""
        directory: Name = "text" if random.random() < 0.125 else "class"
        file = pick(random, ("manifest.json",) * 4 + ("schedule.json",))
        source = self.material.root / "engines" / directory
        engine_dir = folder / "engine"
        link_tree(source, engine_dir, [file])
        label, text = change_json(json.loads((source / file).read_bytes()), random)
        (engine_dir / file).write_bytes(text)
        return _run(self.material, directory, folder, f"{file}: {label}")


@dataclass(frozen=True)
class Resealed:
    """A manifest changed and sealed again, as one who edits it by hand does: what the launch list's own check says."""

    material: Material
    name: str = "manifests, resealed"

    def trial(self, random: np.random.Generator, folder: Path) -> Trial:
        """The class model's directory; half of the changes in the launch list."""
        engine_dir = folder / "engine"
        link_tree(self.material.class_engine, engine_dir, ["manifest.json"])
        manifest = json.loads((engine_dir / "manifest.json").read_bytes())
        if random.random() < 0.5:
            label, text = change_json(manifest["plan"], random, bytes_share=0)
            whole = json.dumps({**manifest, "plan": "\ue000plan"}, indent=1).encode()
            text = whole.replace(json.dumps("\ue000plan").encode(), text)
            label = f"plan.{label}"
        else:
            label, text = change_json(manifest, random, bytes_share=0)
        (engine_dir / "manifest.json").write_bytes(text)
        trial = _run(self.material, "class", folder, label, resealed=True)

        def seal() -> None:
            # The copy's files are links to the originals, which a new seal does not write.
            reseal(engine_dir)

        def marks(ran: Ran) -> tuple[str, ...]:
            found = launch_list_refused(engine_dir)
            return (
                "of these dipgo-compare's check of the launch list finds" if found else "of these it does not find",
            )

        return replace(trial, prepare=seal, marks=marks)


@dataclass(frozen=True)
class Flips:
    """One bit of a graph, a weight or any other file of a directory but the manifest; sometimes with the size, time
    and inode as they were."""

    material: Material
    name: str = "byte flips"

    def trial(self, random: np.random.Generator, folder: Path) -> Trial:
        """The class model's directory, or the text model's (one of three)."""
        directory: Name = "text" if random.random() < 1 / 3 else "class"
        source: Path = self.material.root / "engines" / directory
        names = [path.relative_to(source).as_posix() for path in sorted(source.rglob("*")) if path.is_file()]
        file = pick(random, [name for name in names if name != "manifest.json"])
        engine_dir = folder / "engine"
        link_tree(source, engine_dir, [file])
        path = engine_dir / file
        before = path.stat()
        label, data = flip(path.read_bytes(), random)
        with path.open("r+b") as opened:
            opened.write(data)
        if random.random() < 0.3:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            label += ", its time as before"
        return _run(self.material, directory, folder, f"{directory}: {file}: {label}")


@dataclass(frozen=True)
class Broken:
    """A graph, weights file or other file of a directory cut off, empty, longer or another kind of thing."""

    material: Material
    name: str = "engine files"

    def trial(self, random: np.random.Generator, folder: Path) -> Trial:
        """The class model's directory."""
        source = self.material.class_engine
        names = [path.relative_to(source).as_posix() for path in sorted(source.rglob("*")) if path.is_file()]
        file = pick(random, names)
        engine_dir = folder / "engine"
        link_tree(source, engine_dir, [file])
        path = engine_dir / file
        how = pick(random, ("bytes", "bytes", "bytes", "missing", "folder", "fifo", "link out", "endless", "loop"))
        label = how
        if how == "bytes":
            label, data = change_bytes(path.read_bytes(), random)
            path.write_bytes(data)
        else:
            path.unlink()
            if how == "folder":
                path.mkdir()
            elif how == "fifo":
                os.mkfifo(path)
            elif how == "link out":
                path.symlink_to("/etc/hostname")
            elif how == "endless":
                path.symlink_to("/dev/zero")
            elif how == "loop":
                path.symlink_to(path.name)
        return _run(self.material, "class", folder, f"{file}: {label}")


def launch_list_refused(engine_dir: Path) -> bool:
    """Whether ``dipgo-compare`` finds the launch list to be another than its sampler's."""
    from dipgo_deploy.compare.launch_list import check_launch_list
    from dipgo_deploy.reference.load import load_reference

    bundle = Bundle.open(engine_dir)
    try:
        parts = check_launch_list(bundle.manifest, load_reference(bundle))
    except UserError:
        return True
    return not all(part.passed for part in parts)


def same_pictures(
    material: Material, directory: Name, path: Path, ran: Ran, *, resealed: bool = False
) -> tuple[Verdict, str]:
    """The verdict on a run that ended well."""
    before, after = material.reference(directory), np.load(path)
    if before.dtype == after.dtype and np.array_equal(before, after):
        return Verdict.SAME, ""
    said = [line for line in (ran.out + ran.err).splitlines() if not any(usual in line for usual in _USUAL)]
    if not np.isfinite(after).all():
        return Verdict.SILENT, "pictures that are not finite"
    if said:
        return Verdict.SAID, said[0]
    if before.shape != after.shape:
        return (Verdict.VALID if resealed else Verdict.SILENT), f"shape {after.shape}"
    difference = float(np.abs(before.astype(np.float64) - after).max())
    return (Verdict.VALID if resealed else Verdict.SILENT), f"pictures differ by up to {difference:.2g}"


def _run(material: Material, directory: Name, folder: Path, label: str, *, resealed: bool = False) -> Trial:
    if directory == "text":
        os.link(material.picture, folder / "picture.png")
    arguments = TEXT_RUN if directory == "text" else CLASS_RUN
    argv = run_arguments("engine", arguments)

    def accepted(ran: Ran) -> tuple[Verdict, str]:
        return same_pictures(material, directory, folder / "out.npy", ran, resealed=resealed)

    return Trial(label, [argv], accepted, outputs=("out.npy",))

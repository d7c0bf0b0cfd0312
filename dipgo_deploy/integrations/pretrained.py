"""``Pipeline`` as the package gives it out: with ``from_pretrained``, which can also export."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self

from dipgo_deploy import arguments
from dipgo_deploy.bundle.manifest import MANIFEST_NAME
from dipgo_deploy.errors import UserError
from dipgo_deploy.extras import install
from dipgo_deploy.runtime.pipeline import Pipeline as Drawing
from dipgo_deploy.schedule.built_in import schedule_file

if TYPE_CHECKING:
    from dipgo_deploy.schedule.document import Schedule

# What `from_engine_dir` takes; all other options are those of an export.
_LOADING = ("threads", "share_weights", "cuda_graph", "verify", "load", "lora", "lora_partial", "launches")


class Pipeline(Drawing):
    """An engine directory ready to draw: ``runtime.pipeline.Pipeline`` with ``from_pretrained``."""

    _folder: TemporaryDirectory[str] | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] | Any,
        backend: str = "auto",
        *,
        export: bool = False,
        schedule: Schedule | str | os.PathLike[str] | None = None,
        engine_dir: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> Self:
        """A pipeline of an engine directory, or of a model that is exported first, which needs the extra ``export``.

        Args:
            model: an engine directory; with ``export`` a model as ``dipgo-export --model`` takes it, or a diffusers
                pipeline.
            backend: ``auto``, ``cpu``, ``cuda``, ``tensorrt`` or ``tensorrt-rtx``.
            export: export the model.
            schedule: with ``export`` a schedule, its file or the name of a built-in one; else the name of one of the
                directory's.
            engine_dir: where the export is written, to be opened without one the next time; None: a temporary folder
                that goes with the pipeline.
            options: those of ``from_engine_dir``, and with ``export`` those of ``ExportOptions``: ``dtype``, ``batch``,
                ``height``, ...

        Raises:
            UserError: what ``from_engine_dir`` or the export refuse, an option that neither has, or no extra
                ``export``.
        """
        loading = {name: value for name, value in options.items() if name in _LOADING}
        others = {name: value for name, value in options.items() if name not in _LOADING}
        if not arguments.flag("export", export):
            folder = arguments.path("model", model)
            for name in [*others, *(["engine_dir"] if engine_dir is not None else [])]:
                raise UserError(
                    f"{name}: is no option of loading an engine directory; leave it out, or give export=True"
                )
            if folder.is_dir() and not (folder / MANIFEST_NAME).is_file():
                raise UserError(f"{folder}: is no engine directory; give one, or export=True with a schedule")
            named = None if schedule is None else arguments.text("schedule", schedule)
            return cls.from_engine_dir(folder, backend, schedule=named, **loading)
        if schedule is None:
            raise UserError("schedule: missing; give a schedule, its file or the name of a built-in one for the export")
        temporary = TemporaryDirectory(prefix="dipgo-") if engine_dir is None else None
        target = Path(temporary.name) / "engine" if temporary is not None else arguments.path("engine_dir", engine_dir)
        _export(model, schedule, target, others)
        pipeline = cls.from_engine_dir(target, backend, **loading)
        pipeline._folder = temporary
        return pipeline


def _export(model: Any, schedule: Any, target: Path, options: Mapping[str, Any]) -> None:
    try:
        from dipgo_deploy.export.exporter import ExportOptions, export_bundle
    except ImportError as error:
        raise UserError(f"export=True: needs the extra export ({error}); {install('export')}") from error
    unknown = sorted(set(options) - set(ExportOptions.__dataclass_fields__))
    if unknown:
        raise UserError(f"{unknown[0]}: is no option of an export or of loading an engine directory; leave it out")
    named = schedule_file(Path(schedule)) if isinstance(schedule, str) else schedule
    export_bundle(model, named, target, ExportOptions(**options))

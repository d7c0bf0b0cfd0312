"""Pictures that a run starts from: files broken, and the same picture in every mode and format that Pillow writes."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tools.campaign.kinds.engines import same_pictures
from tools.campaign.material import TEXT_RUN, Material, run_arguments
from tools.campaign.mutate import Changed, change_bytes, pick
from tools.campaign.verdict import Ran, Verdict
from tools.campaign.worker import Trial

_FORMATS = ("PNG", "PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "TGA", "ICO")
# The picture as grey or colour in each mode, and how far the result may be from that of plain RGB.
_MODES = ("I;16", "I", "F", "F unit", "LA", "P", "RGBA", "CMYK", "1", "RGB")
# Of pixels from 0 to 1 (a picture of one colour depth becomes another): what Pillow itself rounds away.
_NEAR = 0.02


@dataclass(frozen=True)
class Pictures:
    """``--image`` of the text model."""

    material: Material
    name: str = "pictures"

    def trial(self, random: np.random.Generator, folder: Path) -> Trial:
        """A broken file (most), or a whole one in another mode."""
        if random.random() < 0.1:
            return self._mode(pick(random, _MODES), folder)
        label, content = change_picture(self.material.picture.read_bytes(), random)
        (folder / "picture.png").write_bytes(content)

        def accepted(ran: Ran) -> tuple[Verdict, str]:
            decoded = _decoded(content)
            if decoded is None:
                return Verdict.SILENT, "accepted, but Pillow reads no whole picture in it"
            verdict, detail = same_pictures(self.material, "text", folder / "out.npy", ran, resealed=True)
            return verdict, detail

        return Trial(label, [run_arguments(self.material.text_engine, TEXT_RUN)], accepted, outputs=("out.npy",))

    def _mode(self, mode: str, folder: Path) -> Trial:
        from PIL import Image

        grey = Image.open(self.material.picture).convert("L")
        values = np.array(grey)
        if mode == "I;16":
            Image.fromarray(values.astype(np.uint16) * 257).save(folder / "picture.png")
        elif mode == "I":
            Image.fromarray(values.astype(np.int32) * 257).save(folder / "given.tiff")
        elif mode.startswith("F"):
            Image.fromarray(values.astype(np.float32) / (255 if mode.endswith("unit") else 1)).save(
                folder / "given.tiff"
            )
        else:
            grey.convert(mode).save(folder / ("given.tiff" if mode == "CMYK" else "picture.png"))
        if (folder / "given.tiff").exists():
            (folder / "given.tiff").rename(folder / "picture.png")
        plain = grey.convert("1").convert("RGB") if mode == "1" else grey.convert("RGB")

        def accepted(ran: Ran) -> tuple[Verdict, str]:
            from dipgo_deploy.cli.run import load_picture

            read = np.asarray(load_picture("--image", folder / "picture.png").convert("RGB"), np.float32) / 255
            difference = float(np.abs(read - np.asarray(plain, np.float32) / 255).max())
            if difference > _NEAR:
                return Verdict.SILENT, f"mode {mode}: pixels differ by up to {difference:.2g} from the same in RGB"
            return Verdict.VALID, ""

        argv = run_arguments(self.material.text_engine, TEXT_RUN)
        return Trial(f"whole, mode {mode}", [argv], accepted, outputs=("out.npy",))


def change_picture(png: bytes, random: np.random.Generator) -> Changed:
    """The picture in some format with bytes changed, or with a header that says another size."""
    from PIL import Image

    form = pick(random, _FORMATS)
    stream = io.BytesIO()
    Image.open(io.BytesIO(png)).save(stream, form)
    content = stream.getvalue()
    if form in ("PNG", "BMP") and random.random() < 0.3:
        side = pick(random, (0, 1, 65, 20_000, 2**31 - 1, 2**32 - 1))
        return f"{form}: width {side}", _other_width(content, form, side)
    label, changed = change_bytes(content, random)
    return f"{form}: {label}", changed


def _other_width(content: bytes, form: str, width: int) -> bytes:
    if form == "BMP":
        return content[:18] + width.to_bytes(4, "little") + content[22:]
    import zlib

    header = content[12:16] + width.to_bytes(4, "big") + content[20:29]
    return content[:12] + header + zlib.crc32(header).to_bytes(4, "big") + content[33:]


def _decoded(content: bytes) -> bytes | None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as picture:
            return picture.convert("RGB").tobytes()
    except Exception:
        return None

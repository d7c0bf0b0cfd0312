"""LoRA files for the text model: headers, configurations and keys changed, in the spellings of three trainers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tools.campaign.kinds import safetensors
from tools.campaign.kinds.engines import same_pictures
from tools.campaign.material import TEXT_RUN, Material, run_arguments
from tools.campaign.mutate import Changed, pick
from tools.campaign.verdict import Ran, Verdict
from tools.campaign.worker import Trial

_LAYERS = tuple(
    f"{block}.attentions.0.transformer_blocks.0.attn{number}.to_{letter}"
    for block in ("down_blocks.0", "mid_block")
    for number in (1, 2)
    for letter in ("q", "v")
)
_KEYS = {
    "PEFT": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight", None),
    "diffusers": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight", None),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "lora_unet_{}.alpha"),
}
_RANK = 2
_ENDS = (
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora.down.weight",
    ".lora.up.weight",
    ".lora_down.weight",
    ".lora_up.weight",
    ".alpha",
)
# Ends of keys that change weights in ways that are not plain LoRA.
_OTHER_ENDS = (
    ".diff",
    ".diff_b",
    ".dora_scale",
    ".hada_w1_a",
    ".lokr_w1",
    ".norm.weight",
    ".lora_mid.weight",
    ".bias",
    "",
)


@dataclass(frozen=True)
class Loras:
    """``--lora`` of the text model."""

    material: Material
    name: str = "LoRA files"

    def trial(self, random: np.random.Generator, folder: Path) -> Trial:
        """A file in some spelling; header or bytes changed, keys renamed, values absurd, patterns in its metadata."""
        spelling = pick(random, tuple(_KEYS))
        tensors = self.tensors(spelling)
        label, content = self.changed(tensors, random)
        (folder / "given.safetensors").write_bytes(content)
        (folder / "picture.png").hardlink_to(self.material.picture)
        arguments = (*TEXT_RUN, "--lora", "given.safetensors")

        def accepted(ran: Ran) -> tuple[Verdict, str]:
            return self.accepted(content, folder, ran)

        argv = run_arguments(self.material.text_engine, arguments)
        return Trial(f"{spelling}: {label}", [argv], accepted, outputs=("out.npy",))

    def tensors(self, spelling: str) -> dict[str, np.ndarray]:
        """The file before it is changed."""
        shapes = _shapes(self.material)
        random = np.random.default_rng(7)
        down_key, up_key, alpha_key = _KEYS[spelling]
        found = {}
        for layer in _LAYERS:
            rows, columns = shapes[layer]
            name = layer.replace(".", "_") if spelling == "kohya" else layer
            found[down_key.format(name)] = (0.1 * random.standard_normal((_RANK, columns))).astype(np.float32)
            found[up_key.format(name)] = (0.1 * random.standard_normal((rows, _RANK))).astype(np.float32)
            if alpha_key is not None:
                found[alpha_key.format(name)] = np.array(1.0, np.float32)
        return found

    def changed(self, tensors: dict[str, np.ndarray], random: np.random.Generator) -> Changed:
        """One change of the file."""
        what = pick(random, ("file", "file", "file", "key", "key", "end", "value", "shape", "pattern"))
        key = pick(random, tuple(tensors))
        if what == "file":
            return safetensors.change(*safetensors.parts(tensors), random)
        if what == "pattern":
            pattern = pick(random, ("(a|a)*b", "(", "a|b", "(a+)+$", "[" * 1000, "x" * 100_000, ".*" * 50 + "q", "\n"))
            config = pick(
                random,
                (
                    {"unet.alpha_pattern": {pattern: 8}, "unet.lora_alpha": 4, "unet.r": 2},
                    {"unet.rank_pattern": {pattern: 8}, "unet.lora_alpha": 4},
                    {"unet.lora_alpha": pick(random, ("nan", 1e400, -1, "x", None, [1], 10**400))},
                    {"unet.use_dora": True, "unet.lora_alpha": 2},
                    {"unet.lora_bias": True},
                    [1],
                    {"unet": pattern},
                ),
            )
            metadata = {"lora_adapter_metadata": json.dumps(config)}
            return f"metadata: {str(config)[:80]}", _whole(tensors, metadata)
        changed = dict(tensors)
        if what == "value":
            value = pick(random, (np.nan, np.inf, 1e38, -3e38, 0.0))
            array = np.array(changed[key])
            array.flat[int(random.integers(array.size))] = value
            changed[key] = array
            return f"{key}: one value {value}", _whole(changed)
        if what == "shape":
            array = np.atleast_1d(changed[key])
            changed[key] = pick(
                random,
                (array.T, array[None], array[..., :1], array.reshape(-1), array[:0], np.tile(array, (3,) * array.ndim)),
            )
            return f"{key}: shape {changed[key].shape}", _whole(changed)
        stem = key.rsplit(".", 2)[0]
        if what == "end":
            end = pick(random, _OTHER_ENDS)
            changed[f"{stem}{end}"] = np.full((4, 4), 0.5, np.float32)
            return f"more: {stem}{end}", _whole(changed)
        letter = int(random.integers(len(key)))
        name = pick(
            random, (key[:letter] + "x" + key[letter + 1 :], f"x.{key}", key.upper(), key + "\x1b[31m", key * 50)
        )
        changed[name] = changed.pop(key)
        return f"{key} -> {name[:80]!r}", _whole(changed)

    def accepted(self, content: bytes, folder: Path, ran: Ran) -> tuple[Verdict, str]:
        """Every tensor of the file that changes weights has to be in the result, or a line says that it is not."""
        verdict, detail = same_pictures(self.material, "text", folder / "out.npy", ran)
        if detail == "pictures that are not finite":
            return verdict, detail
        try:
            tensors = safetensors.read_strictly(content)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            return Verdict.SILENT, f"accepted, but not a right file: {error!r}"
        usual = f"applied {len(_LAYERS)} of {len(_LAYERS)} layers of the denoiser"
        lines = [line for line in (ran.out + ran.err).splitlines() if "given.safetensors" in line]
        pairs = {key.rsplit(".lora", 1)[0] for key in tensors if ".lora" in key}
        complete = any(f"applied {len(pairs)} of {len(pairs)} layers of the denoiser" in line for line in lines)
        if usual in "".join(lines) and tensors.keys() == _known(tensors) and len(pairs) == len(_LAYERS):
            return (Verdict.VALID if complete else Verdict.SAID), lines[0]
        told = any(word in line for line in lines for word in ("left out", "nothing here depends"))
        if told:
            return Verdict.SAID, lines[0]
        if complete and tensors.keys() == _known(tensors):
            return Verdict.VALID, lines[0]
        return Verdict.SILENT, f"{len(tensors)} tensors, {len(pairs)} layers; it says {lines}"


def _known(tensors: dict[str, np.ndarray]) -> set[str]:
    """Keys that are a plain LoRA's."""
    return {key for key in tensors if key.endswith(_ENDS)}


def _whole(tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    header, data = safetensors.parts(tensors, metadata)
    return safetensors.assemble(json.dumps(header).encode(), data)


def _shapes(material: Material) -> dict[str, tuple[int, ...]]:
    """Shapes of the denoiser's layers, from its safetensors file."""
    content = (material.text_model / "unet" / "diffusion_pytorch_model.safetensors").open("rb")
    with content as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {
        name.removesuffix(".weight"): tuple(entry["shape"])
        for name, entry in header.items()
        if name.endswith(".weight")
    }

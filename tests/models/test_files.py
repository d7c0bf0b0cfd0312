from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import save_file

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.files import (
    check_weights,
    denoiser_weights,
    describe_keys,
    is_here,
    left_out_parts,
    loaded_parts,
    say_variants,
    weights_of,
)

STEM = "diffusion_pytorch_model"


def weights(folder: Path, name: str = f"{STEM}.safetensors", *tensors: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({tensor: np.zeros(1, np.float32) for tensor in tensors or ("a",)}, folder / name)
    return folder / name


def index(folder: Path, places: dict[str, str], name: str = f"{STEM}.safetensors.index.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder / name


def model(folder: Path) -> Path:
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "image_encoder": [None, None],
        "requires_safety_checker": True,
    }
    weights(folder / "unet"), weights(folder / "vae"), weights(folder / "text_encoder", "model.safetensors")
    (folder / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **parts}))
    return folder


def rename(folder: Path, variant: str) -> None:
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", f".{variant}.safetensors")))


def test_files_with_and_without_variants(tmp_path: Path) -> None:
    plain, half = weights(tmp_path), weights(tmp_path, f"{STEM}.fp16.safetensors")
    assert weights_of(tmp_path, "diffusers").files == (plain,)
    assert weights_of(tmp_path, "diffusers", "fp16").files == (half,)
    assert weights_of(tmp_path, "diffusers", "bf16") == weights_of(tmp_path, "diffusers")
    plain.unlink()
    found = weights_of(tmp_path, "diffusers")
    assert (found.files, found.variant) == ((half,), "fp16")
    weights(tmp_path, f"{STEM}.non_ema.safetensors")
    with pytest.raises(UserError, match="has weights of the variants fp16, non_ema; choose with --variant"):
        weights_of(tmp_path, "diffusers")
    assert weights_of(tmp_path, "diffusers", "non_ema").variant == "non_ema"


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_several_files_by_their_index(tmp_path: Path, variant: str | None) -> None:
    part = "" if variant is None else f".{variant}"
    names = [f"{STEM}{part}-0000{place}-of-00002.safetensors" for place in (1, 2)]
    files = [weights(tmp_path, name, tensor) for name, tensor in zip(names, "ab", strict=True)]
    index(tmp_path, dict(zip("ab", names, strict=True)), f"{STEM}.safetensors.index{part}.json")
    found = weights_of(tmp_path, "diffusers")
    assert (found.files, found.variant) == (tuple(files), variant)


def test_files_that_are_not_whole_are_named(tmp_path: Path) -> None:
    file = tmp_path / f"{STEM}.safetensors"
    for content, message in (
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
            "is a pointer of Git LFS, not the file",
        ),
        (b"", "is empty; fetch it again"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{", "is not a whole safetensors file"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"{file.name}: {message}"):
            weights_of(tmp_path, "diffusers")
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match=f"{file.name}: cannot be read: Is a directory"):
        weights_of(tmp_path, "diffusers")
    file.rmdir()
    with pytest.raises(UserError, match="has no diffusion_pytorch_model.safetensors: the model is not whole"):
        weights_of(tmp_path, "diffusers")
    with pytest.raises(UserError, match="gone: is missing: the model is not whole"):
        weights_of(tmp_path / "gone", "diffusers")


def test_indexes_that_are_none_are_named(tmp_path: Path) -> None:
    path = index(tmp_path, {"a": "one.safetensors"})
    with pytest.raises(UserError, match="one.safetensors: is missing"):
        weights_of(tmp_path, "diffusers")
    weights(tmp_path, "one.safetensors", "a", "b")
    with pytest.raises(UserError, match="one.safetensors: has other tensors than its index says .first: b."):
        weights_of(tmp_path, "diffusers")
    index(tmp_path, {"a": "../one.safetensors"})
    with pytest.raises(UserError, match="names '../one.safetensors', which is not a file beside it"):
        weights_of(tmp_path, "diffusers")
    for content, message in (
        ("{", "not JSON"),
        ("", "is empty"),
        ("version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        ("[]", "not a JSON object"),
        ('{"weight_map": {"a": 3}}', "has no weight_map"),
        ("[" * 100_000, "not JSON"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=f"index.json: {message}"):
            weights_of(tmp_path, "diffusers")


def test_what_is_loaded_of_a_pipeline_and_what_is_not(tmp_path: Path) -> None:
    folder = model(tmp_path)
    assert list(loaded_parts(folder)) == ["unet", "text_encoder", "tokenizer", "scheduler", "vae"]
    assert left_out_parts(folder) == {"safety_checker": "StableDiffusionSafetyChecker"}
    assert list(denoiser_weights(folder)) == ["unet"]
    assert list(denoiser_weights(folder / "unet")) == ["."]
    check_weights(folder)
    (folder / "vae" / f"{STEM}.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=f"vae/{STEM}.safetensors: is empty"):
        check_weights(folder)


def test_a_variant_that_is_taken_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = model(tmp_path)
    with pytest.raises(UserError, match="no part has weights of the variant fp16; leave out --variant"):
        check_weights(f"{folder}?variant=fp16")
    rename(folder, "fp16")
    asked = f"{folder}?variant=fp16"
    say_variants(asked, check_weights(asked))
    assert caplog.messages == []
    say_variants(folder, check_weights(folder))
    assert caplog.messages == [
        f"{folder}: has weights of the variant fp16 only (unet, text_encoder, vae): they are taken"
    ]


def test_names_of_weights_in_one_line() -> None:
    assert describe_keys({"missing_keys": [], "unexpected_keys": ["position_ids"]}, {"position_ids"}) is None
    info = {"missing_keys": ["c", "b", "a", "d"], "unexpected_keys": ["x"], "mismatched_keys": [("e", 1, 2)]}
    assert describe_keys(info, set()) == (
        "4 weights are missing (a, b, c, ...); 1 weights are not the model's (x); 1 weights have another shape (e)"
    )
    wrapped = {"missing_keys": ["a.w", "b"], "unexpected_keys": ["_orig_mod.a.w", "_orig_mod.b"]}
    assert "begin with _orig_mod. (_orig_mod.a.w)" in str(describe_keys(wrapped, set()))


def test_a_hub_id_is_here_when_all_its_weights_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model(tmp_path)
    hub = ModuleType("huggingface_hub")
    hub.snapshot_download = lambda name, allow_patterns: str(folder)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert is_here("owner/name")
    assert list(check_weights("owner/name")) == ["unet", "text_encoder", "vae"]
    # One of several files is not fetched yet: the library does it.
    whole = folder / "unet" / f"{STEM}.safetensors"
    whole.unlink()
    index(folder / "unet", {"a": f"{STEM}-00001-of-00001.safetensors"})
    assert not is_here("owner/name") and check_weights("owner/name") == {} == denoiser_weights("owner/name")


def test_what_sentencepiece_reads_needs_that_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model(tmp_path)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "spiece.model").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    hint = "tokenizer/spiece.model: is read with the package sentencepiece, which is not installed; pip install"
    with pytest.raises(UserError, match=hint):
        check_weights(folder)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    check_weights(folder)


def test_another_sentencepiece_than_protobuf_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model(tmp_path)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "spiece.model").write_bytes(b"x")

    def other(name: str) -> None:
        raise TypeError("gencode 7, runtime 6")

    monkeypatch.setattr("dipgo_deploy.models.files.importlib.import_module", other)
    with pytest.raises(UserError, match="sentencepiece, which does not fit the protobuf here"):
        check_weights(folder)


def test_a_pipe_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    folder = model(tmp_path)
    path = folder / "vae" / f"{STEM}.safetensors"
    path.unlink()
    os.mkfifo(path)  # what opened it would wait for ever
    with pytest.raises(UserError, match=f"vae/{STEM}.safetensors: not a regular file"):
        check_weights(folder)


def test_more_blocks_than_weights_are_refused_before_they_are_made(tmp_path: Path) -> None:
    def dit(layers: int, *stored: int) -> Path:
        weights(tmp_path, f"{STEM}.safetensors", *(f"transformer_blocks.{number}.ff.weight" for number in stored), "x")
        config = {"_class_name": "DiTTransformer2DModel", "num_layers": layers}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    check_weights(dit(2, 0, 1))
    check_weights(dit(2))  # other names altogether: said when they are loaded
    with pytest.raises(UserError, match=r"says 4098 blocks, .* none for 4096 of them .first: transformer_blocks.2."):
        check_weights(dit(4098, 0, 1))


def test_small_files_that_were_not_fetched_are_named(tmp_path: Path) -> None:
    folder = model(tmp_path)
    (folder / "tokenizer").mkdir()
    file = folder / "tokenizer" / "merges.txt"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(UserError, match="tokenizer/merges.txt: is a pointer of Git LFS, not the file itself"):
        check_weights(folder)
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match="tokenizer/merges.txt: cannot be read: Is a directory"):
        check_weights(folder)
    file.rmdir()
    (folder / "unet" / "config.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="unet/config.json: is a pointer of Git LFS"):
        check_weights(folder)


def test_code_of_others_is_not_loaded(tmp_path: Path) -> None:
    folder = model(tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder": ["my_encoder", "MyEncoder"]}))
    with pytest.raises(UserError, match="text_encoder is my_encoder.MyEncoder: only diffusers and transformers"):
        check_weights(folder)


def test_the_blocks_of_companions_are_in_files_of_their_own(tmp_path: Path) -> None:
    index = {
        "_class_name": "StableDiffusionControlNetPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "controlnet": ["diffusers", "ControlNetModel"],
    }
    units = [f"{side}_blocks.{place}.x" for side in ("down", "up") for place in range(4)]
    weights(tmp_path / "unet", f"{STEM}.safetensors", *units, "mid_block.x")
    weights(tmp_path / "controlnet")
    for name in ("unet", "controlnet"):
        (tmp_path / name / "config.json").write_text(json.dumps({"_class_name": index[name][1]}))
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert list(check_weights(tmp_path)) == ["unet", "controlnet"]

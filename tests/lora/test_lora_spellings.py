"""Every spelling of LoRA files against diffusers' own conversion, and against ``load_lora_weights`` where PEFT is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft  # noqa: E402
from flow_pipelines import save_flux, save_sd3  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from sd_pipelines import save_sd15, save_sdxl  # noqa: E402

from dipgo_deploy.bundle.weights import StoredWeight, WeightsIndex  # noqa: E402
from dipgo_deploy.errors import UserError  # noqa: E402
from dipgo_deploy.lora.file import read_lora  # noqa: E402
from dipgo_deploy.lora.merge import Coverage, _check_coverage, _match, _Weights  # noqa: E402

RANK = 4  # diffusers finds the old spelling of a text encoder by its `out_proj`
FLUX, SD3, SD15, SDXL = "flux", "sd3", "sd15", "sdxl"
SAVE: dict[str, Callable[[Path], Path]] = {
    FLUX: lambda folder: save_flux(folder, small=True),
    SD3: lambda folder: save_sd3(folder, small=True),
    SD15: save_sd15,
    SDXL: save_sdxl,
}
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
Keys = Callable[[str], tuple[str, str]]


@dataclass(frozen=True)
class Case:
    """A file: shapes of its layers by the beginnings of their keys, and the ends of the two matrices' keys.

    alpha: of every layer. applied: layers by component.
    """

    family: str
    layers: dict[str, tuple[int, int]]
    ends: tuple[str, str] = (".lora_down.weight", ".lora_up.weight")
    alpha: float | None = None
    applied: dict[str, int] = field(default_factory=dict)


W = 16
QKV, SQUARE, WIDE, NARROW = (3 * W, W), (W, W), (4 * W, W), (W, 4 * W)
FLUX_KOHYA = {
    **{f"lora_unet_double_blocks_0_{side}_attn_qkv": QKV for side in ("img", "txt")},
    **{f"lora_unet_double_blocks_0_{side}_attn_proj": SQUARE for side in ("img", "txt")},
    **{f"lora_unet_double_blocks_0_{side}_mlp_0": WIDE for side in ("img", "txt")},
    **{f"lora_unet_double_blocks_0_{side}_mlp_2": NARROW for side in ("img", "txt")},
    **{f"lora_unet_double_blocks_0_{side}_mod_lin": (6 * W, W) for side in ("img", "txt")},
    "lora_unet_single_blocks_0_linear2": (W, 5 * W),
    "lora_unet_single_blocks_0_modulation_lin": (3 * W, W),
}
CLIP = "text_model_encoder_layers_0_"
XLABS = {
    **{f"double_blocks.0.processor.qkv_lora{side}": QKV for side in (1, 2)},
    **{f"double_blocks.0.processor.proj_lora{side}": SQUARE for side in (1, 2)},
    "single_blocks.0.processor.qkv_lora": QKV,
    "single_blocks.0.processor.proj_lora": (W, 5 * W),
}
COMFY = {
    "diffusion_model.double_blocks.0.img_attn.qkv": QKV,
    "diffusion_model.double_blocks.0.txt_mlp.0": WIDE,
    "diffusion_model.single_blocks.0.linear2": (W, 5 * W),
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.k_proj": (8, 8),
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.out_proj": (8, 8),
    "text_encoders.clip_l.transformer.text_model.encoder.layers.1.mlp.fc1": (16, 8),
}
MIXTURE = {
    "lora_transformer_single_transformer_blocks_0_attn_to_k": SQUARE,
    "lora_transformer_transformer_blocks_0_attn_to_out_0": SQUARE,
    "lora_transformer_transformer_blocks_0_attn_add_q_proj": SQUARE,
    "lora_transformer_context_embedder": (W, 24),
    f"lora_te1_{CLIP}self_attn_out_proj": (8, 8),
    f"lora_te1_{CLIP}mlp_fc2": (8, 16),
}
OLD_TEXT = {
    f"text_encoder.text_model.encoder.layers.0.self_attn.to_{name}_lora": (W, W) for name in ("q", "k", "v", "out")
}
OLD_UNET = {
    f"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_{name}_lora": (8, 8)
    for name in ("q", "k", "v", "out")
}
SD3_NEW = {
    "transformer.transformer_blocks.0.attn.to_q": SQUARE,
    "transformer.transformer_blocks.0.attn.to_add_out": SQUARE,
    "transformer.transformer_blocks.1.ff.net.0.proj": WIDE,
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (8, 8),
    "text_encoder.text_model.encoder.layers.0.self_attn.out_proj": (8, 8),
    "text_encoder_2.text_model.encoder.layers.1.self_attn.out_proj": (12, 12),
    "text_encoder_2.text_model.encoder.layers.1.mlp.fc1": (24, 12),
}
SD_KOHYA = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (8, 8),
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0": (16, 16),
    "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj": (64, 8),
    f"lora_te_{CLIP}self_attn_v_proj": (16, 16),
    f"lora_te_{CLIP}self_attn_out_proj": (16, 16),
    f"lora_te_{CLIP}mlp_fc1": (32, 16),
}
SDXL_KOHYA = {
    "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q": (16, 16),
    "lora_unet_middle_block_1_transformer_blocks_1_attn2_to_k": (16, 40),
    "lora_unet_output_blocks_0_1_transformer_blocks_0_ff_net_2": (16, 64),
    f"lora_te1_{CLIP}self_attn_out_proj": (16, 16),
    f"lora_te2_{CLIP}self_attn_out_proj": (24, 24),
    f"lora_te2_{CLIP}mlp_fc2": (24, 48),
}
DOWN_UP, A_B = (".down.weight", ".up.weight"), (".lora_A.weight", ".lora_B.weight")
CASES = {
    "flux kohya": Case(
        FLUX,
        {**FLUX_KOHYA, f"lora_te1_{CLIP}self_attn_out_proj": (8, 8), f"lora_te1_{CLIP}mlp_fc1": (16, 8)},
        alpha=2.0,
        applied={"denoiser": 12, "text_encoder": 2},
    ),
    "flux xlabs": Case(FLUX, XLABS, DOWN_UP, applied={"denoiser": 6}),
    "flux comfy": Case(FLUX, COMFY, alpha=3.0, applied={"denoiser": 3, "text_encoder": 3}),
    "flux mixture": Case(FLUX, MIXTURE, alpha=3.0, applied={"denoiser": 4, "text_encoder": 2}),
    "sd3": Case(SD3, SD3_NEW, A_B, applied={"denoiser": 3, "text_encoder": 2, "text_encoder_2": 2}),
    "sd old": Case(SD15, {**OLD_UNET, **OLD_TEXT}, DOWN_UP, applied={"denoiser": 4, "text_encoder": 4}),
    "sd kohya": Case(SD15, SD_KOHYA, alpha=3.0, applied={"denoiser": 3, "text_encoder": 3}),
    "sdxl kohya": Case(
        SDXL,
        SDXL_KOHYA,
        alpha=3.0,
        applied={"denoiser": 3, "text_encoder": 1, "text_encoder_2": 2},
    ),
}


def tensors(layers, ends=(".lora_down.weight", ".lora_up.weight"), alpha=None):
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, (rows, columns) in layers.items():
        found[name + ends[0]] = torch.randn(RANK, columns, generator=generator)
        found[name + ends[1]] = torch.randn(rows, RANK, generator=generator)
        if alpha is not None:
            found[f"{name}.alpha"] = torch.tensor(alpha)
    return found


def indexed(folder: Path, denoiser: torch.nn.Module, encoders: dict[str, torch.nn.Module]) -> Any:
    """What ``_Weights`` reads of an engine directory, for a model whose weights are all stored as they are."""
    for part, members in {"graphs": {"": denoiser}, "components": {f"{k}.": v for k, v in encoders.items()}}.items():
        parameters = {prefix + name: p for prefix, m in members.items() for name, p in m.named_parameters()}
        stored = {
            name: StoredWeight(parameter=name, shape=tuple(p.shape), dtype="float", offset=0, length=0)
            for name, p in parameters.items()
        }
        (folder / part).mkdir()
        (folder / part / "weights.json").write_text(WeightsIndex(tensors=stored).model_dump_json())
    graph = SimpleNamespace(file="components/text_encoder.onnx")
    return SimpleNamespace(
        path=folder,
        manifest=SimpleNamespace(
            model=SimpleNamespace(class_name=type(denoiser).__name__, config=dict(denoiser.config), denoisers=()),
            plan=SimpleNamespace(variants=[SimpleNamespace(graph=SimpleNamespace(file="graphs/v00.onnx"))]),
            components=SimpleNamespace(text_encoder=SimpleNamespace(graph=graph) if encoders else None),
        ),
    )


def mine(bundle: Any, file: Path) -> tuple[dict[str, np.ndarray], tuple[Coverage, ...]]:
    """The change of each weight, by name; those of text encoders begin with the encoder's name."""
    targets, coverage = _match(read_lora(file), _Weights(bundle))
    return {
        target.name: np.float32(target.change.factor) * target.change.rows(target.rows[:]) for target in targets
    }, coverage


def by_conversion(pipeline: Any, file: Path) -> dict[str, np.ndarray]:
    """What diffusers' converter makes of a file, multiplied out."""
    unet = {"unet_config": pipeline.unet.config} if hasattr(pipeline, "unet") else {}
    converted = pipeline.lora_state_dict(str(file), **unet)
    state, alphas = converted if isinstance(converted, tuple) else (converted, None)
    for name, alpha in (alphas or {}).items():
        layer = name.removesuffix(".alpha")
        (down,) = (key for key in (layer, f"{layer}.lora.down.weight") if key in state)
        state[down] = state[down] * (alpha / RANK)
    text = {name: tensor for name, tensor in state.items() if name.startswith("text_encoder")}
    rest = {name: tensor for name, tensor in state.items() if name not in text}
    if any("to_out_lora" in name or "to_q_lora" in name or "lora_linear_layer" in name for name in text):
        old = any("_lora." in name for name in text)
        from diffusers.utils.state_dict_utils import StateDictType

        text = convert_state_dict_to_peft(text, StateDictType.DIFFUSERS_OLD if old else StateDictType.DIFFUSERS)
        text = convert_state_dict_to_peft(text, StateDictType.DIFFUSERS)
    state = {**text, **convert_unet_state_dict_to_peft(rest)}
    return {
        name.removesuffix(".lora_A.weight"): (state[name.replace("lora_A", "lora_B")] @ state[name]).numpy()
        for name in state
        if name.endswith(".lora_A.weight")
    }


def by_peft(folder: Path, file: Path) -> dict[str, np.ndarray]:
    """What ``load_lora_weights`` changes."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    names = [name for name in ("unet", "transformer", *ENCODERS) if getattr(pipeline, name, None) is not None]
    before = {name: {k: p.clone() for k, p in getattr(pipeline, name).named_parameters()} for name in names}
    pipeline.load_lora_weights(str(file))
    pipeline.fuse_lora(components=[name for name in names if name in pipeline._lora_loadable_modules])
    pipeline.unload_lora_weights()
    return {
        f"{name}.{key}".removesuffix(".weight"): (p - before[name][key]).detach().numpy()
        for name in names
        for key, p in getattr(pipeline, name).named_parameters()
        if not torch.equal(p, before[name][key])
    }


def plain(name: str) -> str:
    """A name without what differs between versions and sides."""
    for beginning in ("unet.", "transformer."):
        name = name.removeprefix(beginning)
    return name.replace("text_model.", "").removesuffix(".weight")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = SAVE[family](tmp_path_factory.mktemp(family) / "model")
        return made[family]

    return folder


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("how", ["conversion", "peft"])
def test_as_diffusers_reads_it(folders, tmp_path, name, how):
    case = CASES[name]
    if how == "peft":
        pytest.importorskip("peft")
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors(case.layers, case.ends, case.alpha), file)
    folder = folders(case.family)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    encoders = {name: getattr(pipeline, name) for name in ENCODERS if getattr(pipeline, name, None) is not None}
    got, coverage = mine(indexed(tmp_path, denoiser, encoders), file)
    assert {part.component: part.applied for part in coverage} == case.applied
    assert not any(part.not_applied or part.not_computed for part in coverage)
    want = by_peft(folder, file) if how == "peft" else by_conversion(pipeline, file)
    got, want = ({plain(key): value for key, value in found.items()} for found in (got, want))
    assert got.keys() == want.keys()
    for key, value in want.items():
        np.testing.assert_allclose(got[key], value.reshape(got[key].shape), rtol=1e-4, atol=2e-5, err_msg=key)


def test_flux_at_its_published_width(tmp_path):
    """The first layer of a single block, which diffusers splits only there."""
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    file = tmp_path / "lora.safetensors"
    save_file(tensors({"lora_unet_single_blocks_0_linear1": (3 * 3072 + 12288, 3072)}, alpha=2.0), file)
    got, _ = mine(indexed(tmp_path, model, {}), file)
    want = by_conversion(diffusers.FluxPipeline, file)
    assert {plain(name) for name in got} == {plain(name) for name in want} and len(got) == 4
    for name, value in want.items():
        np.testing.assert_allclose(got[f"{plain(name)}.weight"], value, rtol=1e-4, atol=1e-4)


def test_patterns_as_peft_applies_them(folders, tmp_path):
    pytest.importorskip("peft")
    block = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    config = {
        "r": RANK,
        "lora_alpha": 8,
        "target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
        "alpha_pattern": {"to_q|to_k": 16, r".*to_out\.\d": 2},
    }
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in config.items()})}
    file = tmp_path / "lora.safetensors"
    layers = {f"{block}.{name}": (8, 8) for name in config["target_modules"]}
    save_file(tensors(layers, A_B), file, metadata)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folders(SD15), local_files_only=True)
    got, _ = mine(indexed(tmp_path, pipeline.unet, {}), file)
    want = by_peft(folders(SD15), file)
    assert len(got) == len(want) == 4
    for name, value in want.items():
        np.testing.assert_allclose(got[f"{plain(name)}.weight"], value, rtol=1e-4, atol=2e-5)


def test_t5_is_found_in_both_families_and_stable_diffusion_3_in_its_own_names(folders, tmp_path):
    joint = {"lora_unet_joint_blocks_0_x_block_attn_qkv": QKV, "lora_unet_joint_blocks_0_context_block_mlp_fc1": WIDE}
    t5 = {"lora_te3_encoder_block_0_layer_0_SelfAttention_q": (16, 24)}
    for family, encoder, layers in ((SD3, "text_encoder_3", joint), (FLUX, "text_encoder_2", {})):
        (tmp_path / family).mkdir()
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folders(family), local_files_only=True)
        encoders = {name: getattr(pipeline, name) for name in ENCODERS if getattr(pipeline, name, None) is not None}
        save_file(tensors({**layers, **t5}), tmp_path / "lora.safetensors")
        got, _ = mine(indexed(tmp_path / family, pipeline.transformer, encoders), tmp_path / "lora.safetensors")
        block = "transformer_blocks.0"
        names = {f"{block}.attn.to_{name}.weight" for name in "qkv"} | {f"{block}.ff_context.net.0.proj.weight"}
        t5_name = f"{encoder}.encoder.block.0.layer.0.SelfAttention.q.weight"
        assert got.keys() == {t5_name} | (names if layers else set())


def refused(folder, layers, denoiser, encoders, ends=A_B, partial=False, more=None):
    """The message of a file that is refused; None where it is not."""
    file = folder / "lora.safetensors"
    save_file({**tensors(layers, ends), **(more or {})}, file)
    weights = _Weights(indexed(folder, denoiser, encoders))
    lora = read_lora(file)
    try:
        _check_coverage(lora, _match(lora, weights)[1], weights, partial)
    except UserError as error:
        return str(error)
    return None


CLIP_0 = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
UNET_0 = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("layers", "more", "says", "with_partial"),
    [
        ({UNET_0: (8, 8), CLIP_0: (16, 16)}, {}, None, None),
        # a denoiser's part that fits nothing, beside a text encoder's that does
        (
            {"transformer.single_transformer_blocks.0.attn.to_q": (16, 16), CLIP_0: (16, 16)},
            {},
            "1 of its 1 layers of the denoiser are none of this model's .* it was made for another model: FLUX",
            None,
        ),
        ({"unet.conv_inn": (8, 8)}, {}, "none of this model's .*; nothing of it can be applied", "nothing of it"),
        ({UNET_0: (8, 8), "unet.conv_inn": (8, 8)}, {}, "1 of its 2 layers .*--lora-partial", None),
        ({UNET_0: (8, 8)}, {"unet.x.lokr_w1": torch.ones(2, 2)}, r"not supported \(LoKr: unet.x.lokr_w1\)", None),
        ({UNET_0: (8, 8)}, {"unet.conv_norm_out.weight": torch.ones(8)}, r"\(a whole weight", None),
        # a layer above all that the text encoder has here, and one that changes nothing
        ({UNET_0: (8, 8), CLIP_0: (16, 16), CLIP_0.replace(".0.", ".7."): (16, 16)}, {}, None, None),
        ({UNET_0: (8, 8), CLIP_0: (16, 16), "text_encoder.text_projection": (16, 16)}, {}, None, None),
        ({UNET_0: (8, 8), "text_encoder.text_projection": (16, 16)}, {}, "no output here depends on any", None),
        ({UNET_0: (8, 8)}, {"text_encoders.t5xxl.transformer.x.diff": torch.zeros(2, 2)}, None, None),
        ({}, {"text_encoders.t5xxl.transformer.x.diff": torch.zeros(2, 2)}, "none of its layers is", "none of its"),
        (
            {UNET_0: (8, 8)},
            {"unet.conv_in.diff": torch.ones(8, 4, 3, 3), "unet.conv_in.diff_b": torch.ones(8)},
            None,
            None,
        ),
    ],
)
def test_what_is_not_applied_whole_is_refused_unless_partial(folders, tmp_path, layers, more, says, with_partial):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folders(SD15), local_files_only=True)
    for partial, wanted in ((False, says), (True, with_partial)):
        folder = tmp_path / str(partial)
        folder.mkdir()
        message = refused(
            folder, layers, pipeline.unet, {"text_encoder": pipeline.text_encoder}, partial=partial, more=more
        )
        assert (message is None) == (wanted is None)
        if wanted is not None:
            assert re.search(wanted, message), message


def test_two_spellings_of_one_layer(folders, tmp_path):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folders(SD15), local_files_only=True)
    more = tensors({f"lora_{UNET_0.replace('.', '_')}": (8, 8)})
    message = refused(tmp_path, {UNET_0: (8, 8)}, pipeline.unet, {}, partial=True, more=more)
    assert "change the same weight; leave one out" in str(message)

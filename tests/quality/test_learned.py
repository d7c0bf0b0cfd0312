"""Learned judges from local folders, random weights of the real classes; recorded numbers are those of lpips 0.1.4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from learned_weights import clip_weights, lpips_weights
from sd_pipelines import TOKENIZER
from transformers import AutoTokenizer, CLIPModel

from dipgo_deploy.errors import UserError
from dipgo_deploy.quality.learned import Lpips, clip_model, image_reward

PROMPTS = ["a cat", "a photo of a dog"]


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = torch.arange(40)[:, None] / 40, torch.arange(36)[None] / 36
    one = torch.stack([torch.sin(9 * rows + k * columns) / 2 + 0.5 for k in range(6)]).reshape(2, 3, 40, 36)
    other = torch.stack([torch.cos(7 * rows * columns + k) / 2 + 0.5 for k in range(6)]).reshape(2, 3, 40, 36)
    return one, 0.7 * one + 0.3 * other


LPIPS = {"alex": [0.0080937641, 0.0198716056], "vgg": [0.0232770294, 0.0129913371]}


@pytest.mark.parametrize("name", ["alex", "vgg"])
def test_lpips_gives_the_packages_numbers(tmp_path: Path, name: str) -> None:
    judge = Lpips(lpips_weights(tmp_path, name))
    one, other = pictures()
    assert judge.name == name
    assert judge(one, other).tolist() == pytest.approx(LPIPS[name], rel=1e-3)
    assert judge(one, one).tolist() == [0, 0]


def test_lpips_weights_that_do_not_fit_are_refused_by_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has 0 files vgg16\*.pth"):
        Lpips(tmp_path)
    lpips_weights(tmp_path, "alex")
    file = tmp_path / "alexnet-owt-7be5be79.pth"
    torch.save({"features.0.weight": torch.zeros(2)}, file)
    with pytest.raises(UserError, match=r"alexnet.*features.0.weight has the shape \(2,\)"):
        Lpips(tmp_path)
    file.write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="is no checkpoint of tensors"):
        Lpips(tmp_path)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_weights(tmp_path_factory.mktemp("clip"))


def test_clip_gives_the_models_cosines(clip_folder: Path) -> None:
    judge = clip_model(clip_folder)
    generator = torch.Generator().manual_seed(0)
    shown = torch.rand(2, 3, 32, 32, generator=generator)
    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), AutoTokenizer.from_pretrained(clip_folder)
    words = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    values = (shown - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        found = model(input_ids=words["input_ids"], attention_mask=words["attention_mask"], pixel_values=values)
    cosines = found.logits_per_image.diagonal() / model.logit_scale.exp()
    torch.testing.assert_close(judge(shown, PROMPTS), cosines.detach())
    wide = torch.nn.functional.pad(shown, (8, 8))  # of another shape the middle is looked at
    torch.testing.assert_close(judge(wide, PROMPTS), cosines.detach(), atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match="no CLIPModel there"):
        clip_model(clip_folder / "nowhere")


def reward_folder(folder: Path) -> tuple[Path, dict[str, Any]]:
    """``ImageReward.pt`` with the names of its own classes, from random models of transformers."""
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.save_pretrained(folder)
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 40,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "architectures": ["BertModel"],
    }
    (folder / "med_config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=128,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            layer_norm_eps=1e-6,
        )
    ).eval()
    del config["architectures"]
    text = BlipTextModel(
        BlipTextConfig(**config, encoder_hidden_size=128, is_decoder=True), add_pooling_layer=False
    ).eval()
    with torch.no_grad():  # weights of a fresh model are so small that nothing shows
        for parameter in (*vision.parameters(), *text.parameters()):
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    head = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in ((16, 12), (12, 8), (8, 6), (6, 4), (4, 1))))
    own = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding.": "patch_embed.proj.",
        "encoder.layers.": "blocks.",
        "self_attn.projection.": "attn.proj.",
        "self_attn.": "attn.",
        "layer_norm": "norm",
        "post_layernorm.": "norm.",
    }
    weights = {}
    for key, value in vision.state_dict().items():
        for theirs, named in own.items():
            key = key.replace(theirs, named)
        weights[f"blip.visual_encoder.{key}"] = value
    weights |= {f"blip.text_encoder.{key}": value for key, value in text.state_dict().items()}
    weights["blip.text_proj.weight"] = torch.zeros(2)
    for place, key in enumerate((0, 2, 4, 6, 7)):  # layers of dropout lie between them
        weights |= {f"mlp.layers.{key}.{name}": value for name, value in head[place].state_dict().items()}
    torch.save(weights, folder / "ImageReward.pt")
    return folder, {"vision": vision, "text": text, "head": head, "tokenizer": tokenizer}


def test_image_reward_is_its_published_formula(tmp_path: Path) -> None:
    folder, models = reward_folder(tmp_path)
    judge = image_reward(folder)
    shown = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    words = models["tokenizer"](PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    with torch.no_grad():
        embeds = models["vision"]((shown - mean[:, None, None]) / std[:, None, None]).last_hidden_state
        hidden = models["text"](
            input_ids=words["input_ids"],
            attention_mask=words["attention_mask"],
            encoder_hidden_states=embeds,
            encoder_attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        ).last_hidden_state
        wanted = (models["head"](hidden[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072
    torch.testing.assert_close(judge(shown, PROMPTS), wanted)
    assert (judge(shown, PROMPTS) - judge(shown.flip(0), PROMPTS)).abs().max() > 1e-4
    (folder / "med_config.json").write_text("{}")
    with pytest.raises(UserError, match="ImageReward"):
        image_reward(folder)

"""Learned judges of pictures, with weights from a local folder: nothing is fetched.

Imports torch: import it inside functions. Each loader takes the folder of one judge and refuses, by the name of the
file, what is missing or does not fit. The architectures are those of the published weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from dipgo_deploy.errors import UserError, one_line

# Of OpenAI's CLIP, which BLIP took over.
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

Judged = Callable[[Tensor, Sequence[str]], Tensor]
"""Pictures (B, 3, H, W) in [0, 1] and their prompts -> (B,)."""

_ALEXNET = ((64, 11, 4, 2), "pool", (192, 5, 1, 2), "pool", (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))
_VGG16 = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)
# Positions in torchvision's ``features`` of what LPIPS compares.
_TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}


class Lpips:
    """Learned perceptual distance (Zhang et al., CVPR 2018; version 0.1 of its weights): 0 for equal pictures.

    folder: torchvision's weights of the network (``alexnet*.pth`` or ``vgg16*.pth``) and the package's of the distance
    (``alex.pth`` or ``vgg.pth``).
    """

    def __init__(self, folder: Path) -> None:
        self.name = "alex" if (folder / "alex.pth").is_file() else "vgg"
        network = _only(folder, "alexnet*.pth" if self.name == "alex" else "vgg16*.pth")
        self._features = (_alexnet() if self.name == "alex" else _vgg16()).eval()
        _load(self._features, _state(network), network, "features.")
        heads, file = [], _only(folder, f"{self.name}.pth")
        given = _state(file)
        for place in range(len(_TAPS[self.name])):
            key = f"lin{place}.model.1.weight"
            if key not in given:
                raise UserError(f"{file}: has no {key}; give the weights of LPIPS 0.1")
            heads.append(given[key].float())
        self._heads = heads

    @torch.no_grad()
    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1], H and W at least 32 -> (B,)."""
        total = torch.zeros(len(left))
        for one, other, head in zip(self._seen(left), self._seen(right), self._heads, strict=True):
            total += ((one - other) ** 2 * head).sum(1).mean((1, 2))
        return total

    def _seen(self, pictures: Tensor) -> list[Tensor]:
        mean, std = (
            pictures.new_tensor(row).reshape(1, 3, 1, 1) for row in ((-0.03, -0.088, -0.188), (0.458, 0.448, 0.45))
        )
        values, found = (pictures.float() * 2 - 1 - mean) / std, []
        for place, layer in enumerate(self._features):
            values = layer(values)
            if place in _TAPS[self.name]:
                found.append(values / (values.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found


def clip_model(folder: Path) -> Judged:
    """Cosine of picture and prompt, by a CLIP model and its tokenizer in transformers' format.

    With CLIP's weights it is the CLIP score (Hessel et al., EMNLP 2021) over 100, with those of HPS v2 or PickScore,
    which have this architecture, their preference.

    Raises:
        UserError: no such model or tokenizer there.
    """
    from transformers import AutoTokenizer, CLIPModel

    model = _pretrained(CLIPModel, folder).eval()
    tokenizer = _pretrained(AutoTokenizer, folder)
    side, length = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def judge(pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        words = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        found = model(
            input_ids=words["input_ids"], attention_mask=words["attention_mask"], pixel_values=_for_clip(pictures, side)
        )
        cosines: Tensor = (found.image_embeds * found.text_embeds).sum(1)
        return cosines

    return judge


def image_reward(folder: Path) -> Judged:
    """What people prefer, by ImageReward (Xu et al., NeurIPS 2023): about 0 on average, one standard deviation is 1.

    folder: ``ImageReward.pt``, ``med_config.json``, and BERT's tokenizer.

    Raises:
        UserError: one of them is missing or does not fit.
    """
    import json

    from transformers import AutoTokenizer, BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    file = _only(folder, "ImageReward.pt")
    given = _state(file)
    parts: dict[str, dict[str, Tensor]] = {"visual_encoder": {}, "text_encoder": {}, "mlp": {}}
    for key, value in given.items():
        part, _, rest = key.removeprefix("blip.").partition(".")
        if part in parts:
            parts[part][rest] = value
    seen = {_vision_name(key): value for key, value in parts["visual_encoder"].items()}
    try:
        config = json.loads(_only(folder, "med_config.json").read_text(encoding="utf-8"))
        width, patches = (
            seen["embeddings.position_embedding"].shape[2],
            seen["embeddings.position_embedding"].shape[1] - 1,
        )
        patch = seen["embeddings.patch_embedding.weight"].shape[-1]
        side = patch * round(patches**0.5)
        vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=width,
                intermediate_size=seen["encoder.layers.0.mlp.fc1.weight"].shape[0],
                num_hidden_layers=1 + max(int(key.split(".")[2]) for key in seen if key.startswith("encoder.layers.")),
                num_attention_heads=max(1, width // 64),
                image_size=side,
                patch_size=patch,
                layer_norm_eps=1e-6,
            )
        )
        text = BlipTextModel(
            BlipTextConfig(
                **{name: config[name] for name in _TEXT_SETTINGS if name in config},
                encoder_hidden_size=width,
                is_decoder=True,
            ),
            add_pooling_layer=False,
        )
        sizes = [parts["mlp"][key].shape for key in sorted(parts["mlp"], key=_place) if key.endswith("weight")]
    except (KeyError, ValueError, IndexError, OSError) as error:
        raise UserError(f"{folder}: is no ImageReward ({one_line(error)}); give its published files") from None
    head = nn.Sequential(*(nn.Linear(size[1], size[0]) for size in sizes))
    _load(vision, seen, file)
    _load(text, {key: value for key, value in parts["text_encoder"].items() if "position_ids" not in key}, file)
    linear = sorted({key.rpartition(".")[0] for key in parts["mlp"]}, key=_place)
    renamed = {f"{linear.index(key.rpartition('.')[0])}.{key.rpartition('.')[2]}": v for key, v in parts["mlp"].items()}
    _load(head, renamed, file)
    tokenizer = _pretrained(AutoTokenizer, folder)
    vision.eval(), text.eval()

    @torch.no_grad()
    def judge(pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        words = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        embeds = vision(_for_clip(pictures, side)).last_hidden_state
        hidden = text(
            input_ids=words["input_ids"],
            attention_mask=words["attention_mask"],
            encoder_hidden_states=embeds,
            encoder_attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        ).last_hidden_state[:, 0]
        rewards: Tensor = (head(hidden)[:, 0] - 0.16717362830052426) / 1.0333394966054072
        return rewards

    return judge


_TEXT_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "layer_norm_eps",
    "hidden_act",
)
# Names of BLIP's own vision transformer and what they are in transformers.
_VISION_NAMES = (
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.", ".self_attn."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"^norm\.", "post_layernorm."),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^cls_token$", "embeddings.class_embedding"),
)


def _vision_name(key: str) -> str:
    for pattern, wanted in _VISION_NAMES:
        key = re.sub(pattern, wanted, key)
    return key


def _place(key: str) -> int:
    """``layers.4.weight`` -> 4."""
    return int(key.split(".")[1])


def _alexnet() -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for entry in _ALEXNET:
        if isinstance(entry, str):
            layers.append(nn.MaxPool2d(3, 2))
        else:
            layers += [nn.Conv2d(channels, entry[0], entry[1], entry[2], entry[3]), nn.ReLU()]
            channels = entry[0]
    return nn.Sequential(*layers)


def _vgg16() -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for entry in _VGG16:
        if isinstance(entry, str):
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(channels, entry, 3, padding=1), nn.ReLU()]
            channels = entry
    return nn.Sequential(*layers)


def _for_clip(pictures: Tensor, side: int) -> Tensor:
    """The shorter side made ``side`` (bicubic), the middle cut out, normalised."""
    height, width = pictures.shape[-2:]
    scale = side / min(height, width)
    size = (max(side, round(height * scale)), max(side, round(width * scale)))
    resized = interpolate(pictures.float(), size=size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    mean, std = (resized.new_tensor(row).reshape(1, 3, 1, 1) for row in (_CLIP_MEAN, _CLIP_STD))
    return (resized[..., top : top + side, left : left + side] - mean) / std


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise UserError(f"{folder}: has {len(found)} files {pattern}, needs one of them")
    return found[0]


def _state(file: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint of torch; nothing else is read from it."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle can fail in any way
        raise UserError(f"{file}: is no checkpoint of tensors ({one_line(error)[:100]})") from None
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{file}: is no checkpoint of tensors alone")
    return dict(found)


def _load(module: nn.Module, weights: Mapping[str, Tensor], file: Path, prefix: str = "") -> None:
    """Every weight of the module from the file; what the file has besides is of other parts."""
    found = {}
    for key, value in module.state_dict().items():
        name = f"{prefix}{key}"
        if name not in weights or weights[name].shape != value.shape:
            there = "is missing" if name not in weights else f"has the shape {tuple(weights[name].shape)}"
            raise UserError(f"{file}: {name} {there}; give the published weights")
        found[key] = weights[name].float()
    module.load_state_dict(found)
    module.requires_grad_(False)


def _pretrained(kind: Any, folder: Path) -> Any:
    try:
        if not folder.is_dir():
            raise OSError("no such folder")
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises anything here
        raise UserError(f"{folder}: no {kind.__name__} there ({one_line(error)[:100]})") from None

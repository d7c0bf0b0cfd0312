"""What surrounds the denoiser: text encoder, tokenizer and VAE decoder, exported so that a bundle needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dipgo_deploy.bundle.manifest import Components, Graph, TextEncoderEntry
from dipgo_deploy.errors import UserError
from dipgo_deploy.export.program import to_onnx, torch_dtype
from dipgo_deploy.export.tensors import graph_entry
from dipgo_deploy.export.weights import save_graph, write_weights

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from dipgo_deploy.bundle.manifest import LatentSpec

TOKENIZER_FILE = "tokenizer/tokenizer.json"


def export_components(pipeline: Any, stage: Path, latent: LatentSpec, *, batch: int, dtype: str) -> Components:
    """Export what the diffusers pipeline has beside its denoiser into the folder ``stage``.

    The modules are converted to ``dtype`` in place. A pipeline without text encoder or VAE gives a bundle that takes
    embeddings or gives latents.

    Raises:
        UserError: a component that the exporter refuses, or a tokenizer that has no ``tokenizers`` form.
    """
    text_encoder = getattr(pipeline, "text_encoder", None)
    vae = getattr(pipeline, "vae", None)
    labels = getattr(pipeline, "labels", None)  # DiTPipeline: name -> class id
    classes = getattr(getattr(pipeline, "transformer", None), "config", {}).get("num_embeds_ada_norm")
    return Components(
        text_encoder=_text_encoder(text_encoder, pipeline.tokenizer, stage, dtype)
        if text_encoder is not None
        else None,
        vae_decoder=_vae_decoder(vae, stage, latent, batch, dtype) if vae is not None else None,
        class_labels=dict(labels) if labels else None,
        null_class=classes,
    )


def _text_encoder(encoder: torch.nn.Module, tokenizer: Any, stage: Path, dtype: str) -> TextEncoderEntry:
    import torch

    class LastHiddenState(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.encoder(input_ids)[0]

    length = int(tokenizer.model_max_length)
    encoder.to(torch_dtype(dtype)).eval()
    model = to_onnx(
        LastHiddenState().eval(),
        [torch.zeros(1, length, dtype=torch.int64)],
        ["input_ids"],
        lambda: ["text_embeddings"],
        dtype=dtype,
        prefix="encoder.",
        label=type(encoder).__name__,
    )
    _save_tokenizer(tokenizer, stage / TOKENIZER_FILE)
    return TextEncoderEntry(
        graph=_save(model, stage, "text_encoder"),
        tokenizer=TOKENIZER_FILE,
        length=length,
        pad_id=int(tokenizer.pad_token_id),
        output="encoder_hidden_states",
    )


def _vae_decoder(vae: Any, stage: Path, latent: LatentSpec, batch: int, dtype: str) -> Graph:
    import torch

    scaling = float(vae.config.scaling_factor)
    shift = float(getattr(vae.config, "shift_factor", None) or 0.0)
    wanted = torch_dtype(dtype)

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vae = vae

        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            image = self.vae.decode((latents / scaling + shift).to(wanted), return_dict=False)[0]
            return (image.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)

    vae.to(wanted).eval()
    model = to_onnx(
        Decoder().eval(),
        [torch.randn(batch, latent.channels, latent.height, latent.width)],
        ["latents"],
        lambda: ["images"],
        dtype=dtype,
        prefix="vae.",
        label=type(vae).__name__,
    )
    return _save(model, stage, "vae_decoder")


def _save(model: ir.Model, stage: Path, name: str) -> Graph:
    folder = stage / "components" / name
    folder.mkdir(parents=True)
    write_weights([model], folder)
    path = folder / "model.onnx"
    save_graph(model, path)
    return graph_entry(model, path.relative_to(stage).as_posix())


def _save_tokenizer(tokenizer: Any, path: Path) -> None:
    """Write the ``tokenizers`` form, without padding and truncation, which the runtime sets itself."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"{type(tokenizer).__name__}: has no `tokenizers` form; save the pipeline with a fast tokenizer"
        )
    data = json.loads(backend.to_str())
    data.update(padding=None, truncation=None)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")

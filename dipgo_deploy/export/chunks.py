"""Decoders and encoders of videos in chunks of frames, so that memory does not grow with the length of the video.

A VAE that goes through time hands its last frames on from one chunk to the next: ``state``. The first chunk starts with
zeros, which is what a causal convolution has in front of a video.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dipgo_deploy.errors import UserError

# Frames that AutoencoderKLWan encodes at a time.
_ENCODED = 4
# What AutoencoderKLWan writes for zeros.
_ZEROS = "Rep"

State = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True)
class Part:
    """One graph of a decoder or an encoder.

    Attributes:
        start, stop: the frames of the first chunk that it takes: latent ones to decode, of the video to encode.
        run(vae, frames, state): frames as the VAE takes them, (B, C, stop - start, h, w) -> what it makes of them,
            (B, 3, F, H, W) or moments (B, 2 C, f, h, w), and the state that it leaves; None in it for what stays zero.
    """

    start: int
    stop: int
    run: Callable[[Any, torch.Tensor, State], tuple[torch.Tensor, State]]


@dataclass(frozen=True)
class Chunks:
    """How a video is decoded or encoded: the distinct ``parts``, and for each chunk in order the part and its first
    frame."""

    parts: tuple[Part, ...]
    order: tuple[tuple[int, int], ...]


def chunks_of(vae: Any, frames: int | None) -> Chunks | None:
    """The chunks that a VAE decodes ``frames`` latent frames in, as it does by itself; None: all at once."""
    of_class = _CLASSES.get(type(vae).__name__)
    return None if of_class is None or frames is None else of_class(vae, frames)


def encoder_chunks_of(vae: Any, frames: int) -> Chunks | None:
    """The chunks that a VAE encodes ``frames`` frames of a video in, as it does by itself; None: all at once.

    Raises UserError for a number of frames that it does not encode all of.
    """
    of_class = _ENCODERS.get(type(vae).__name__)
    return None if of_class is None else of_class(vae, frames)


def state_shapes(vae: Any, chunks: Chunks, whole: Sequence[int]) -> tuple[torch.Size, ...]:
    """Shapes of the state between chunks for latents or a video (B, C, f, h, w); nothing is computed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        state: State = ()
        for number, _ in chunks.order[:2]:
            part = chunks.parts[number]
            chunk = torch.zeros(*whole[:2], part.stop - part.start, *whole[3:], dtype=vae.dtype)
            _, state = part.run(vae, chunk, state)
            last = state
    return tuple(entry.shape for entry in last if entry is not None)


def _wan(vae: Any, frames: int) -> Chunks:
    """One latent frame after the other, as its ``_decode`` does."""

    def first(vae: Any, latents: torch.Tensor, _: State) -> tuple[torch.Tensor, State]:
        return _wan_frame(vae, latents, None)

    parts = [Part(0, 1, first), Part(1, 2, _wan_frame)]
    return Chunks(tuple(parts[: min(frames, 2)]), tuple((min(frame, 1), frame) for frame in range(frames)))


def _wan_frame(vae: Any, latents: torch.Tensor, state: State | None) -> tuple[torch.Tensor, State]:
    """state: of each causal convolution in turn its last two frames; None in front of a video."""
    kept: list[Any] = [None] * vae._cached_conv_counts["decoder"]
    if state is not None:
        kept[: len(state)] = [_ZEROS if entry is None else entry for entry in state]
    place = [0]
    video = vae.decoder(vae.post_quant_conv(latents), feat_cache=kept, feat_idx=place, first_chunk=state is None)
    if vae.config.patch_size is not None:
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        video = unpatchify(video, patch_size=vae.config.patch_size)
    # The convolutions that lengthen time are left out in the first chunk, and leave a word: zeros, to the next one.
    left = [entry if isinstance(entry, torch.Tensor) else None for entry in kept[: place[0]]]
    return video.clamp(-1.0, 1.0), tuple(entry if entry is None else _two_frames(entry) for entry in left)


def _two_frames(frames: torch.Tensor) -> torch.Tensor:
    missing = 2 - frames.shape[2]
    return torch.nn.functional.pad(frames, (0, 0, 0, 0, missing, 0)) if missing else frames


def _wan_encoder(vae: Any, frames: int) -> Chunks:
    """The first frame and then four at a time, as its ``_encode`` does."""
    if (frames - 1) % _ENCODED:
        raise UserError(
            f"--num-frames {frames}: {type(vae).__name__} encodes {_ENCODED} frames at a time behind the first; give a "
            f"multiple of {_ENCODED} and 1"
        )

    def first(vae: Any, frames: torch.Tensor, _: State) -> tuple[torch.Tensor, State]:
        return _wan_encoded(vae, frames, None)

    parts = (Part(0, 1, first), Part(1, 1 + _ENCODED, _wan_encoded))
    following = tuple((1, start) for start in range(1, frames, _ENCODED))
    return Chunks(parts[: 2 if following else 1], ((0, 0), *following))


def _wan_encoded(vae: Any, frames: torch.Tensor, state: State | None) -> tuple[torch.Tensor, State]:
    """state: of each causal convolution in turn its last two frames; None in front of a video."""
    kept: list[Any] = [None] * vae._cached_conv_counts["encoder"]
    kept[: len(state or ())] = state or ()
    if vae.config.patch_size is not None:
        from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

        frames = patchify(frames, patch_size=vae.config.patch_size)
    place = [0]
    moments = vae.quant_conv(vae.encoder(frames, feat_cache=kept, feat_idx=place))
    return moments, tuple(_two_frames(entry) for entry in kept[: place[0]])


def _hunyuan(vae: Any, frames: int) -> Chunks | None:
    """Overlapping windows, blended where they meet, as its ``_temporal_tiled_decode`` does."""
    ratio = vae.temporal_compression_ratio
    most, stride = vae.tile_sample_min_num_frames // ratio, vae.tile_sample_stride_num_frames // ratio
    if not vae.use_framewise_decoding or frames <= most:
        return None
    windows = [(start, min(start + most + 1, frames)) for start in range(0, frames, stride)]
    # A window of one frame behind others makes none: the first frame of each but the first is dropped.
    windows = [window for window in windows if window[0] == 0 or window[1] - window[0] > 1]
    kinds = list(dict.fromkeys((start == 0, stop - start) for start, stop in windows))
    parts = []
    for kind in kinds:
        start, stop = next(window for window in windows if (window[0] == 0, window[1] - window[0]) == kind)
        parts.append(Part(start, stop, _hunyuan_window))
    return Chunks(tuple(parts), tuple((kinds.index((start == 0, stop - start)), start) for start, stop in windows))


def _hunyuan_window(vae: Any, latents: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
    """state: the last frames of the window before, which those of this one are blended with."""
    kept, stride = vae.tile_sample_min_num_frames, vae.tile_sample_stride_num_frames
    video = vae.decoder(vae.post_quant_conv(latents))
    if state:
        (before,) = state
        assert before is not None
        video = video[:, :, 1:]
        share = torch.arange(kept - stride, dtype=video.dtype).reshape(-1, 1, 1) / (kept - stride)
        blended = before * (1 - share) + video[:, :, : kept - stride] * share
        video = torch.cat([blended, video[:, :, kept - stride :]], dim=2)
    shown = stride if state else stride + 1
    return video[:, :, :shown], (video[:, :, -(kept - stride) :],)


_CLASSES: dict[str, Callable[[Any, int], Chunks | None]] = {
    "AutoencoderKLWan": _wan,
    "AutoencoderKLHunyuanVideo": _hunyuan,
}

_ENCODERS: dict[str, Callable[[Any, int], Chunks | None]] = {"AutoencoderKLWan": _wan_encoder}

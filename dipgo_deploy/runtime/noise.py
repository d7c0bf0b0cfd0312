"""torch's seeded normal noise on the CPU, without torch: a seed gives the initial latents that diffusers gives."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dipgo_deploy import arguments
from dipgo_deploy.errors import UserError

_BLOCK = 16
_HALF = _BLOCK // 2


class TorchNoise:
    """The stream of ``torch.Generator("cpu").manual_seed(seed)`` under ``torch.randn(..., dtype=torch.float32)``.

    Draws follow each other as torch's do. Values agree within 1e-6: the random bits are the same, but logarithm, sine
    and cosine are rounded differently by torch's builds for different processors. Noise is always drawn in float32, as
    a pipeline in float32 does: torch's stream for float16 and bfloat16 is another one, so a pipeline in those types
    gives another picture for the same seed.

    seed: any integer that torch takes, -2**63 to 2**64 - 1; like torch's engine, only its low 32 bits count. Raises
    UserError beyond that.
    """

    def __init__(self, seed: int) -> None:
        if not -(2**63) <= seed < 2**64:
            raise UserError(f"seed {seed} is out of range; use an integer from -2**63 to 2**64 - 1")
        self.seed = seed
        self._engine = np.random.RandomState(seed & 0xFFFFFFFF)
        self._second: float | None = None

    def randn(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """The next draw: standard normal, float32, of this shape."""
        size = math.prod(shape)
        values = self._large(size) if size >= _BLOCK else self._small(size)
        return values.reshape(tuple(shape))

    def _large(self, size: int) -> NDArray[np.float32]:
        """torch's path from 16 values on: Box-Muller in blocks of 16; a ragged end redraws the last 16 values."""
        uniform = self._uniform(size)
        whole = size - size % _BLOCK
        values = np.empty(size, dtype=np.float32)
        values[:whole] = _box_muller(uniform[:whole])
        if whole != size:
            values[-_BLOCK:] = _box_muller(self._uniform(_BLOCK))
        return values

    def _small(self, size: int) -> NDArray[np.float32]:
        """torch's path below 16 values: one by one in double precision; normals come in pairs, the second is kept."""
        return np.array([self._normal() for _ in range(size)], dtype=np.float32)

    def _normal(self) -> float:
        if self._second is not None:
            value, self._second = self._second, None
            return value
        turn, height = self._uniform_double(), self._uniform_double()
        radius = math.sqrt(-2.0 * math.log1p(-height))
        angle = 2.0 * math.pi * turn
        self._second = radius * math.sin(angle)
        return radius * math.cos(angle)

    def _bits(self, size: int) -> NDArray[np.uint32]:
        return self._engine.randint(0, 2**32, size=size, dtype=np.uint32)

    def _uniform(self, size: int) -> NDArray[np.float32]:
        return (self._bits(size) & np.uint32(2**24 - 1)).astype(np.float32) * np.float32(2.0**-24)

    def _uniform_double(self) -> float:
        high, low = (int(word) for word in self._bits(2))
        return ((high << 32 | low) & (2**53 - 1)) * 2.0**-53


class GeneratorNoise:
    """The stream of a torch.Generator of the caller's, which goes on from where it is. It is of the CPU.

    seed: the one that it was given first.
    """

    def __init__(self, generator: Any) -> None:
        self._torch = sys.modules["torch"]  # that of the generator: the runtime itself needs none
        self._generator = generator
        self.seed: int = generator.initial_seed()

    def randn(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """The next draw: standard normal, float32, of this shape."""
        drawn: NDArray[np.float32] = self._torch.randn(
            tuple(shape), generator=self._generator, dtype=self._torch.float32
        ).numpy()
        return drawn


class NoiseOfEach:
    """A stream for each image: of every draw image i has what its own stream gives for it alone.

    So diffusers draws for a list of generators. seed: of the first.
    """

    def __init__(self, streams: Sequence[TorchNoise | GeneratorNoise]) -> None:
        self._streams = streams
        self.seed = streams[0].seed

    def randn(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """The next draw (images, ...). Raises UserError where it is not for as many images as there are seeds."""
        if shape[0] != len(self._streams):
            raise UserError(
                f"seed: one for each of {len(self._streams)} images, and {shape[0]} pictures to draw for at once; give "
                "one for all"
            )
        return np.concatenate([stream.randn((1, *shape[1:])) for stream in self._streams])


Noise = TorchNoise | GeneratorNoise | NoiseOfEach


def noise_of(seed: object, generator: object, images: int) -> Noise:
    """What is drawn from for a call: of a seed, or in its place of a torch.Generator; or of one for each image.

    Raises:
        UserError: neither is one, both are given, their number is not that of the images, or a generator of a GPU.
    """
    name, given = ("seed", seed) if generator is None else ("generator", generator)
    if generator is not None and seed != 0:
        raise UserError("seed and generator: give one of the two")
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence | np.ndarray):
        return _stream(name, given)
    if len(given) != images:
        raise UserError(f"{name}: {len(given)} given for {images} images; give one, or one for each")
    return NoiseOfEach([_stream(name, one) for one in given])


def _stream(name: str, given: object) -> TorchNoise | GeneratorNoise:
    if name == "seed":
        return TorchNoise(arguments.whole(name, given))
    device = getattr(getattr(given, "device", None), "type", None)
    if not hasattr(given, "initial_seed") or "torch" not in sys.modules:
        raise arguments.wrong(name, given, "a torch.Generator")
    if device != "cpu":
        raise UserError(f"generator: of {device}; noise is drawn on the CPU here, give a generator of the CPU")
    return GeneratorNoise(given)


@dataclass(frozen=True)
class LoopNoise:
    """All that one loop draws, float32 (B, C, [f,] h, w) each.

    picture: latents of the picture that a run starts from, which are noise here; None for a run that starts from none.
    latents: initial unit noise. draws: of the sampler, in order.
    """

    picture: NDArray[np.float32] | None
    latents: NDArray[np.float32]
    draws: tuple[NDArray[np.float32], ...]


def loop_noise(seed: int, shape: Sequence[int], draws: int, *, picture: bool) -> LoopNoise:
    """What a loop without a picture of its own is compared on; drawn in this order. Raises UserError as TorchNoise."""
    stream = TorchNoise(seed)
    start = stream.randn(shape) if picture else None
    latents = stream.randn(shape)
    return LoopNoise(start, latents, tuple(stream.randn(shape) for _ in range(draws)))


def _box_muller(uniform: NDArray[np.float32]) -> NDArray[np.float32]:
    """Normals from uniforms: in each block of 16 the first half makes radii, the second half angles."""
    blocks = uniform.reshape(-1, 2, _HALF)
    # 1 - u keeps the logarithm finite. Both lines round to float32 where torch does; the functions themselves are
    # evaluated in double, nearest to every build of torch.
    inverse = np.float32(1.0) - blocks[:, 0]
    angle = (np.float32(2.0 * math.pi) * blocks[:, 1]).astype(np.float64)
    radius = np.sqrt(-2.0 * np.log(inverse.astype(np.float64)))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).astype(np.float32).reshape(-1)

"""The noise stream against torch's own generator."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dipgo_deploy.errors import UserError
from dipgo_deploy.runtime.noise import TorchNoise, noise_of

SEEDS = [0, 1, 42, 2**31, 2**32 - 1, 2**32, 2**40 + 7, 2**64 - 1, -1, -5, -(2**63)]
LATENTS = (1, 4, 64, 64)


def torch_draws(seed: int, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float32).numpy() for shape in shapes]


def assert_same_stream(seed: int, shapes: list[tuple[int, ...]]) -> None:
    noise = TorchNoise(seed)
    for shape, expected in zip(shapes, torch_draws(seed, shapes), strict=True):
        actual = noise.randn(shape)
        assert actual.dtype == np.float32
        assert actual.shape == expected.shape
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_latents_and_step_noises(seed: int) -> None:
    assert_same_stream(seed, [LATENTS, LATENTS, (2, 4, 8, 8)])


@pytest.mark.parametrize("size", [0, 1, 2, 3, 14, 15, 16, 17, 31, 32, 33, 100, 4095, 100_003])
def test_each_size_and_what_follows_it(size: int) -> None:
    assert_same_stream(5, [(size,), (7,), (size,), (16,)])


def test_a_pair_is_split_across_draws() -> None:
    # The second of a pair waits through any number of large draws.
    assert_same_stream(11, [(3,), LATENTS, (17,), (1,), (2,), (), (5,), (2, 3, 5, 7)])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    shapes=st.lists(st.lists(st.integers(0, 7), max_size=4).map(tuple), min_size=1, max_size=8),
)
def test_any_sequence_of_draws(seed: int, shapes: list[tuple[int, ...]]) -> None:
    assert_same_stream(seed, shapes)


def test_a_million_values_are_standard_normal_to_the_bit_of_torch() -> None:
    assert_same_stream(123, [(1_000_003,)])


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 10**30])
def test_seeds_that_torch_refuses(seed: int) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        torch.Generator().manual_seed(seed)
    with pytest.raises(UserError, match=f"seed {seed} is out of range"):
        TorchNoise(seed)


def test_needs_no_torch() -> None:
    code = "import sys; from dipgo_deploy.runtime.noise import TorchNoise; TorchNoise(0).randn((4, 4)); " + (
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_seed_for_each_image_is_a_generator_for_each() -> None:
    from diffusers.utils.torch_utils import randn_tensor

    seeds = (3, 2**40, -1)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = noise_of(seeds, None, 3)
    for shape in ((3, 4, 8, 8), (3, 2)):
        expected = randn_tensor(shape, generator=generators)
        np.testing.assert_allclose(noise.randn(shape), expected.numpy(), rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="one for each of 3 images, and 2 pictures to draw for at once"):
        noise.randn((2, 4))


def test_a_generator_goes_on_from_where_it_is() -> None:
    generator = torch.Generator().manual_seed(5)
    torch.randn(3, generator=generator)
    twin = torch.Generator().manual_seed(5)
    twin.set_state(generator.get_state())
    noise = noise_of(0, generator, 2)
    assert noise.seed == 5
    for shape in ((2, 4, 8, 8), (2, 3)):
        np.testing.assert_array_equal(noise.randn(shape), torch.randn(shape, generator=twin).numpy())
    several = noise_of(0, [torch.Generator().manual_seed(seed) for seed in (1, 2)], 2).randn((2, 4, 8, 8))
    np.testing.assert_allclose(several, noise_of([1, 2], None, 2).randn((2, 4, 8, 8)), rtol=0, atol=1e-6)
    for seed, other, message in (
        (0, [generator], "generator: 1 given for 2 images"),
        (1, generator, "give one of the two"),
        (0, 3, "generator: int .*torch.Generator|generator"),
        ([1, 2, 3], None, "seed: 3 given for 2 images"),
    ):
        with pytest.raises(UserError, match=message):
            noise_of(seed, other, 2)

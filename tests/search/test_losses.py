from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d

from dipgo_deploy.search.losses import IMAGE_LOSSES, LATENT_LOSSES, psnr, sparsity, ssim


def reference_ssim(left: np.ndarray, right: np.ndarray) -> float:
    """Wang et al. 2004 written out with scipy, one channel, windows inside the image only."""
    offsets = np.arange(-5, 6)
    kernel = np.exp(-(offsets**2) / (2 * 1.5**2))
    kernel /= kernel.sum()

    def blurred(image: np.ndarray) -> np.ndarray:
        return correlate1d(correlate1d(image, kernel, axis=0), kernel, axis=1)[5:-5, 5:-5]

    mean_l, mean_r = blurred(left), blurred(right)
    var_l, var_r = blurred(left**2) - mean_l**2, blurred(right**2) - mean_r**2
    cov = blurred(left * right) - mean_l * mean_r
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_l * mean_r + c1) * (2 * cov + c2)
    return float((top / ((mean_l**2 + mean_r**2 + c1) * (var_l + var_r + c2))).mean())


def test_ssim_is_that_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.random((2, 3, 16, 20)), rng.random((2, 3, 16, 20))
    right = 0.7 * left + 0.3 * right
    expected = [np.mean([reference_ssim(left[b, c], right[b, c]) for c in range(3)]) for b in range(2)]
    actual = ssim(torch.from_numpy(left), torch.from_numpy(right))
    assert actual.tolist() == pytest.approx(expected, abs=1e-10)


def test_ssim_of_equal_images_is_one_and_of_others_less() -> None:
    image = torch.rand(2, 3, 12, 12)
    assert ssim(image, image).tolist() == pytest.approx([1, 1])
    assert (ssim(image, 1 - image) < 0.5).all()


def test_ssim_has_the_right_gradient() -> None:
    left = torch.rand(1, 1, 12, 12, dtype=torch.float64, requires_grad=True)
    right = torch.rand(1, 1, 12, 12, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda image: ssim(image, right), (left,))


def test_ssim_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(ValueError, match="smaller than the window"):
        ssim(torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match="cannot be compared"):
        ssim(torch.rand(1, 1, 12, 12), torch.rand(2, 1, 12, 12))


def test_distances_by_hand() -> None:
    left, right = torch.zeros(2, 3, 12, 12), torch.full((2, 3, 12, 12), 0.5)
    assert LATENT_LOSSES["latent-l1"](left, right).tolist() == [0.5, 0.5]
    assert LATENT_LOSSES["latent-l2"](left, right).tolist() == [0.25, 0.25]
    both = IMAGE_LOSSES["ssim"](left, right) + IMAGE_LOSSES["l1"](left, right)
    assert torch.equal(IMAGE_LOSSES["ssim+l1"](left, right), both)
    assert psnr(left, right).tolist() == pytest.approx([-10 * np.log10(0.25)] * 2)


def test_sparsity_by_hand() -> None:
    gates = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]], requires_grad=True)
    price = sparsity(gates, (0.25, 0.75))
    assert price.item() == pytest.approx((0.25 + 0.75 + 0.75 + 0.25) / 6)
    price.backward()
    assert gates.grad is not None
    assert torch.allclose(gates.grad, torch.tensor([[0.25, 0.75]] * 3) / 6)

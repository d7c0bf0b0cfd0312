"""What a pipeline does to predictions shows in the probes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from dipgo_deploy.errors import UserError
from dipgo_deploy.integrations.probes import check_unguided, probe, scale_in
from dipgo_deploy.models.guidance import PLAIN, Guidance, beyond_conditional, renormalised

GUIDES = {
    "plain": PLAIN,
    "beyond": Guidance(combine=beyond_conditional, off=0.0),
    "renormalised": Guidance(combine=renormalised),
}
SHAPE = (2, 4, 8, 6)


def halves() -> tuple[Tensor, Tensor]:
    return probe(SHAPE, conditional=False), probe(SHAPE, conditional=True)


@pytest.mark.parametrize("scale", [1.0, 0.4, 3.3, 7.5, 15.0])
@pytest.mark.parametrize("name", GUIDES)
def test_the_scale_is_found_whichever_way_predictions_count(name: str, scale: float) -> None:
    guide = GUIDES[name]
    made = guide.combine(*halves(), scale)
    assert scale_in(made, guide) == pytest.approx(scale, rel=1e-5)
    assert scale_in(-made, guide) == pytest.approx(scale, rel=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda made: rescale_noise_cfg(made, halves()[1], guidance_rescale=0.5),
        lambda made: made * 1.1,
        lambda made: made + 0.2,
        lambda made: torch.cat([made[:1], made[:1] * 1.5]),
        lambda made: made.clamp(-3, 3),
    ],
)
def test_more_than_guidance_is_refused(change: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(UserError, match="changes predictions by more than classifier-free guidance"):
        scale_in(change(PLAIN.combine(*halves(), 5.0)), PLAIN)


def test_an_unguided_prediction_has_to_arrive_as_it_was_returned() -> None:
    returned = torch.cat(halves())
    check_unguided(returned, returned)
    check_unguided(-returned, returned)
    with pytest.raises(UserError, match="leave it out"):
        check_unguided(returned * 0.9, returned)

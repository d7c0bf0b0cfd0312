"""Prompt to picture: an engine directory's pipeline beside diffusers' own, stage by stage.

tokens: ids as the text encoders get them. conditions: what the denoiser is given, from encoded prompts, classes, sizes,
pictures and the guidance scale. VAE: pictures of one latent. picture: everything together, under the same seed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from dipgo_deploy.compare.metrics import TensorError, Tolerance, image_errors, tensor_error
from dipgo_deploy.compare.report import IMAGES, LATENTS, Part
from dipgo_deploy.compare.stock import Case, StockPipeline, StockRun
from dipgo_deploy.compare.worst import Seen, nobody
from dipgo_deploy.errors import NotFiniteError
from dipgo_deploy.runtime.given_pictures import picture_conditions
from dipgo_deploy.runtime.requests import Asked, OutputType, check_request, class_condition, classes_of, text_conditions

if TYPE_CHECKING:
    from dipgo_deploy.bundle.manifest import Manifest
    from dipgo_deploy.runtime.pipeline import Pipeline

PLAIN = ("a photo",)
# What users write and what breaks: more tokens than there is room for, nothing, other alphabets, both cases.
UNUSUAL = (
    "A red SHOE, and a (very small:1.2) Bag!  ",
    "a red shoe and a bag " * 60,
    "",
    "Café ñandú ﬁ 靴 🙂 \t a coat",
)
UNUSUAL_NEGATIVES = ("blurry, LOW quality", "", "a coat " * 60, "größe 靴")
STOCK = "the stock pipeline"
_EXACT = Tolerance(0.0)


def cases(
    manifest: Manifest,
    prompts: Sequence[str] = (),
    labels: Sequence[int] = (),
    *,
    guidance_scale: float | None = None,
    seed: int = 0,
) -> list[Case]:
    """Calls that an engine directory is compared at: a plain one that leaves all defaults, and unusual ones.

    Args:
        prompts, labels, guidance_scale: what was asked for takes the place of them.
    """
    scaled = manifest.guidance or any(spec.source == "guidance" for spec in manifest.conditions)
    one_picture = manifest.sampler.strength is not None or bool(picture_conditions(manifest))
    if text_conditions(manifest):
        first = Case("a plain prompt", tuple(prompts) or PLAIN, guidance_scale=guidance_scale, seed=seed)
        if prompts:
            return [first]
        scale = guidance_scale if guidance_scale is not None or not scaled else 3.0
        negatives = UNUSUAL_NEGATIVES if manifest.guidance else None
        if not one_picture:
            return [first, Case("unusual prompts", UNUSUAL, negatives, None, scale, seed + 1)]
        return [
            first,
            *(
                Case("an unusual prompt", (prompt,), negatives and (negatives[place],), None, scale, seed + 1)
                for place, prompt in enumerate(UNUSUAL[:1])
            ),
        ]
    if class_condition(manifest) is not None:
        known = classes_of(manifest)
        chosen = tuple(labels) or tuple(dict.fromkeys((known[0], known[len(known) // 2], known[-1])))
        first = Case("classes", labels=chosen[:1], guidance_scale=guidance_scale, seed=seed)
        if labels:
            return [first]
        return [first, Case("several classes", labels=chosen, guidance_scale=2.0 if scaled else None, seed=seed + 1)]
    return [Case("noise alone", seed=seed)]


class Pictures:
    """Both pipelines of an engine directory.

    Raises:
        UserError: the stock pipeline cannot do what the directory does, or a graph cannot be loaded.
    """

    def __init__(
        self, ours: Pipeline, stock: StockPipeline, tolerance: Tolerance, seen: Seen = nobody, *, conditions: Tolerance
    ) -> None:
        """tolerance: of pictures and their latents. seen: is shown every picture. conditions: their tolerance."""
        self._ours, self._stock, self._tolerance, self._seen = ours, stock, tolerance, seen
        self._of_conditions = conditions
        self._manifest = ours.bundle.manifest

    def components(self, case: Case) -> list[Part]:
        """Tokens and conditions of a case; nothing is denoised."""
        case = self._stock.possible(case)
        expected = self._stock.conditions(case)
        return [*self._tokens(case, expected), *self._conditions(case, expected)]

    def picture(self, case: Case) -> list[Part]:
        """The picture (and its latents) of each prompt or class of a case."""
        case = self._stock.possible(case)
        expected = self._stock(case)
        kind: OutputType = "np" if self._decodes(expected) else "latent"
        try:
            with _no_warnings():
                actual = self._ours(**self._call(case), seed=case.seed, output_type=kind)
        except NotFiniteError as error:
            return [Part("picture", case.name, STOCK, (), str(error))]
        parts = []
        for row, place in enumerate(case.places):
            errors = []
            if expected.latents is not None:
                errors.append(_error(LATENTS, actual.latents[row], expected.latents[row], self._tolerance))
            if self._decodes(expected):
                assert expected.images is not None
                picture = np.asarray(actual.images[row])
                errors += image_errors(IMAGES, picture[None], expected.images[row][None], self._tolerance)
                self._seen(f"{case.name}, {place}", picture, expected.images[row])
            parts.append(Part("picture", f"{case.name}, {place}", STOCK, tuple(errors)))
        return parts

    def _decodes(self, expected: StockRun) -> bool:
        return expected.images is not None and self._manifest.components.vae_decoder is not None

    def _call(self, case: Case) -> dict[str, Any]:
        """The same call of the engine directory's pipeline."""
        arguments: dict[str, Any] = {
            "prompt": None if case.prompts is None else list(case.prompts),
            "negative_prompt": None if case.negatives is None else list(case.negatives),
            "class_labels": None if case.labels is None else list(case.labels),
            "guidance_scale": case.guidance_scale,
            **self._stock.pictures(),
        }
        return {name: value for name, value in arguments.items() if value is not None}

    def _tokens(self, case: Case, expected: StockRun) -> Iterator[Part]:
        """The ids of each prompt and each negative one, as far as both go: what is longer is cut after it was encoded
        (``TextScheme.prefix``; the text of Qwen-Image's pipeline), which the conditions show."""
        encoder = self._manifest.components.text_encoder
        if encoder is None or case.prompts is None:
            return
        halves = [(case.prompts, False)]
        if self._manifest.guidance and not (encoder.zeros_without_negative and case.negatives is None):
            halves.append((case.negatives or ("",) * len(case.prompts), True))
        for entry in encoder.tokenizers:
            name = entry.file.partition("/")[0]
            calls = expected.tokens.get(name.replace("tokenizer", "text_encoder"), [])
            for (prompts, negative), theirs in zip(halves, calls, strict=False):
                for row, prompt in enumerate(prompts):
                    with _no_warnings():
                        ids = self._ours.tokens(prompt, negative=negative)[entry.ids][0]
                    wanted = theirs[min(row, len(theirs) - 1)]
                    kind = "negative prompt" if negative else "prompt"
                    place = f"{name}, {kind} {_short(prompt)}"
                    both = min(len(ids), len(wanted))
                    yield _tokens_part(place, ids[:both], wanted[:both])

    def _conditions(self, case: Case, expected: StockRun) -> Iterator[Part]:
        call = self._call(case)
        with _no_warnings():
            request = check_request(self._manifest, Asked(**call, output_type="latent"))
            found = self._ours.conditions(request, case.seed)
        masks = [
            expected.conditions[spec.name]
            for spec in self._manifest.conditions
            if spec.source == "text" and spec.dtype == "int64" and spec.name in expected.conditions
        ]
        for spec in self._manifest.conditions:
            halves = found[spec.name]
            stock = expected.conditions.get(spec.name)
            place = f"{case.name}, {spec.name}"
            if stock is None:
                yield Part("conditions", place, STOCK, (), "the stock pipeline gives its denoiser nothing of this name")
                continue
            rows = np.concatenate([half for half in halves if half is not None])
            if self._stock.conditional_first and halves[0] is not None:
                rows = np.concatenate([halves[1], halves[0]])
            parts = case.places * (1 if halves[0] is None else 2)
            if rows.shape[1:] != stock.shape[1:] or len(stock) != len(rows):
                yield Part("conditions", place, STOCK, (), f"shape {rows.shape}, the stock pipeline's is {stock.shape}")
                continue
            rows, stock = _as_seen(masks, rows), _as_seen(masks, stock)
            pairs = zip(rows, stock, strict=True)
            errors = tuple(_error(spec.name, ours, theirs, self._of_conditions) for ours, theirs in pairs)
            half = len(rows) // 2 if halves[0] is not None else 0
            for row, error in enumerate(errors):
                negative = halves[0] is not None and (row < half) != self._stock.conditional_first
                label = "unconditional half of " if negative else ""
                yield Part("conditions", f"{case.name}, {label}{parts[row]}", STOCK, (error,))


def _error(name: str, actual: np.ndarray, expected: np.ndarray, tolerance: Tolerance) -> TensorError:
    return tensor_error(name, np.asarray(actual, np.float64), np.asarray(expected, np.float64), tolerance)


def _as_seen(masks: Sequence[np.ndarray], states: np.ndarray) -> np.ndarray:
    """A condition without what the denoiser does not see: the states of padding, where it gets a mask. What an encoder
    makes of padding depends on how much of it there is."""
    mask = next((mask for mask in masks if states.ndim == 3 and states.shape[:2] == mask.shape), None)
    if mask is None:
        return states
    seen: np.ndarray = np.where(mask[..., None] != 0, states, 0)
    return seen


def _tokens_part(place: str, ids: np.ndarray, expected: np.ndarray) -> Part:
    error = tensor_error("ids", ids, expected, _EXACT)
    if error.passed:
        return Part("tokens", place, STOCK, (error,))
    if ids.shape != expected.shape:
        return Part("tokens", place, STOCK, (), f"{len(ids)} ids, the stock pipeline gives {len(expected)}")
    first = int(np.flatnonzero(ids != expected)[0])
    note = f"id {first} is {ids[first]}, the stock pipeline gives {expected[first]}"
    return Part("tokens", place, STOCK, (), note)


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 40 else f"{prompt[:37]}...")


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Prompts that are too long on purpose are no news."""
    log = logging.getLogger("dipgo_deploy.runtime.text")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)

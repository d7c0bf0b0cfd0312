"""Tiny problems, loaded and traced once for all tests of the search."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from search_models import STEPS, save_dit, save_unet
from shared_traces import shared_traces

from dipgo_deploy.search.problem import Problem, ProblemOptions, load_problem


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def _traced_once() -> Iterator[None]:
    with shared_traces():
        yield


@pytest.fixture(scope="session")
def dit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `save_dit`."""
    return save_dit(tmp_path_factory.mktemp("dit"))


@pytest.fixture(scope="session")
def unet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `save_unet`."""
    return save_unet(tmp_path_factory.mktemp("unet"))


@pytest.fixture(scope="session")
def problem(dit_folder: Path) -> Problem:
    """The transformer, five steps of its own DDIM."""
    with shared_traces():
        return load_problem(ProblemOptions(model=str(dit_folder), steps=STEPS, guidance_scale=3.0))


@pytest.fixture(scope="session")
def unet_problem(unet_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Problem:
    """The UNet, five steps of DDIM, two prompts."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a cat\n\n  a dog \n", encoding="utf-8")
    options = ProblemOptions(model=str(unet_folder), sampler="ddim", steps=STEPS, prompts=str(prompts))
    with shared_traces():
        return load_problem(options)

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from resident import resident_kib
from safetensors.torch import load_file, save_file
from tiny_engines import save_dit_pipeline, save_in_half

from dipgo_deploy.models.files import check_weights
from dipgo_deploy.reference import mapped
from dipgo_deploy.supernet.load import load_denoiser, stored_dtype

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dit_pipeline(tmp_path_factory.mktemp("model"), layers=2)


@pytest.fixture(scope="module")
def half(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_in_half(model, tmp_path_factory.mktemp("half") / "model")


def test_a_float32_copy_loads_mapped_and_is_gone_afterwards(model: Path, half: Path, tmp_path: Path) -> None:
    assert (stored_dtype(model), stored_dtype(half)) == (torch.float32, torch.float16)
    with mapped.float32_files(str(model), tmp_path) as folder:
        assert folder == str(model)
    expected = dict(load_denoiser(half)[0].state_dict())
    with mapped.float32_files(str(half), tmp_path) as folder:
        copy = load_denoiser(folder)[0]
        files = mapped.mapped_files()
        for name, parameter in copy.named_parameters():
            assert any(first <= parameter.data_ptr() < last for first, last in files), name
        found = copy.state_dict()
    assert list(tmp_path.iterdir()) == []
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_pages_that_were_given_back_are_read_again(model: Path) -> None:
    denoiser = load_denoiser(model)[0]
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([9, 9]), torch.tensor([1, 2])
    with torch.no_grad():
        expected = denoiser(*inputs).sample
        mapped.give_back_after_use(denoiser)
        for _ in range(2):
            assert torch.equal(denoiser(*inputs).sample, expected)


def test_pages_are_given_back(tmp_path: Path) -> None:
    """The kernel's own count of the pages in memory."""
    linear = torch.nn.Linear(512, 512)
    save_file(linear.state_dict(), tmp_path / "linear.safetensors")
    linear.load_state_dict(load_file(tmp_path / "linear.safetensors"), assign=True)
    linear(torch.ones(1, 512))
    before = resident_kib("linear.safetensors")
    mapped.give_back_after_use(linear)
    linear(torch.ones(1, 512))
    assert before > 1000
    assert resident_kib("linear.safetensors") < 100


def test_pages_of_a_linked_file_are_given_back(model: Path, tmp_path: Path) -> None:
    """A hub's cache: a snapshot is a folder of links to files that are called after their content."""
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshots" / "main"
    for number, path in enumerate(path for path in model.rglob("*") if path.is_file()):
        blob = Path(shutil.copy(path, tmp_path / "blobs" / f"{number:040x}"))
        (snapshot / path.relative_to(model)).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / path.relative_to(model)).symlink_to(blob)
    assert check_weights(snapshot).keys() == {"transformer", "vae"}
    denoiser, expected = load_denoiser(snapshot)[0], load_denoiser(model)[0].state_dict()
    files = mapped.mapped_files()
    for name, parameter in denoiser.named_parameters():
        assert torch.equal(parameter, expected[name]), name
        assert any(first <= parameter.data_ptr() < last for first, last in files), name


def test_caches_lie_in_files_without_names(tmp_path: Path) -> None:
    caches = mapped.MappedCaches(tmp_path)
    large = torch.randn(512, 1024).T  # not in C order
    held = caches.put(large)
    assert resident_kib(str(tmp_path)) < 100
    for _ in range(2):
        assert torch.equal(caches.get(held), large)
        assert resident_kib(str(tmp_path)) < 100
    assert torch.equal(held, large)
    assert resident_kib(str(tmp_path)) > 1000
    caches.give_back(held)
    assert resident_kib(str(tmp_path)) < 100
    assert torch.equal(caches.get(caches.put(torch.tensor(3.5))), torch.tensor(3.5))
    assert list(tmp_path.iterdir()) == []


def test_pages_that_were_written_to_are_kept(tmp_path: Path) -> None:
    """They are not in the file: given back, a merged weight would be the file's again."""
    save_file({"weight": torch.zeros(1024, 1024)}, tmp_path / "changed.safetensors")
    weight = load_file(tmp_path / "changed.safetensors")["weight"]
    assert _is_mapped(weight)
    weight[3] = 1.0
    assert not _is_mapped(weight)
    mapped.give_back(weight, mapped.mapped_files())
    assert weight.sum() == 1024


def _is_mapped(tensor: torch.Tensor) -> bool:
    return any(first <= tensor.data_ptr() < last for first, last in mapped.mapped_files())

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_engine import Toy, build, embed

from dipgo_deploy.backends.onnxruntime import OnnxRuntimeBackend
from dipgo_deploy.cli import outputs
from dipgo_deploy.cli.run import main, parse_labels
from dipgo_deploy.errors import UserError
from dipgo_deploy.runtime.pipeline import Pipeline


@pytest.fixture(scope="module")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("text"), Toy(batch=2))


@pytest.fixture(scope="module")
def class_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("class"), Toy(kind="class", batch=1))


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def command(engine_dir: Path, *more: object) -> list[str]:
    return ["--engine-dir", str(engine_dir), "--threads", "1", "--backend", "cpu", *map(str, more)]


def test_a_picture_is_written_and_reported(text_dir, tmp_path, capsys):
    target = tmp_path / "bag.png"
    assert main(command(text_dir, "--prompt", "a bag", "-o", target)) == 0
    printed = capsys.readouterr()
    assert "bag.png: 1 image(s), toy on cpu, 6 launches" in printed.out
    assert printed.err == ""
    want = Pipeline.from_engine_dir(text_dir, "cpu", threads=1)("a bag").images[0]
    np.testing.assert_array_equal(np.asarray(Image.open(target)), np.asarray(want))
    assert [path.name for path in tmp_path.iterdir()] == ["bag.png"]
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask()


def test_json_goes_to_stdout_and_words_to_stderr(text_dir, tmp_path, capsys):
    target = tmp_path / "grid.PNG"
    options = ["--prompt", "a bag", "--prompt", "a boot", "--num-images", "2", "--seed", "7", "--json", "-o", target]
    assert main(command(text_dir, *options)) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    seconds = report.pop("seconds")
    memory = report.pop("memory")
    assert (memory["graphs_loaded"], memory["graphs"], memory["device"]) == (4, 4, {})
    assert memory["host"]["rss"] >= memory["host"]["pss"] > 2**20
    assert report == {
        "output": str(target),
        "output_type": "pil",
        "images": 4,
        "shape": [4, 4, 8, 8],
        "model": "toy",
        "backend": "cpu",
        "seed": 7,
        "schedule": None,
        "evaluations": 6,
        "launches": 12,
        "loras": [],
    }
    assert seconds["total"] >= seconds["loop"] > 0
    assert "4 image(s)" in printed.err
    assert "memory: 4 of 4 graphs loaded, rss " in printed.err
    assert Image.open(target).size == (16, 16)


@pytest.mark.parametrize(("output_type", "shape"), [("np", (2, 8, 8, 3)), ("latent", (2, 4, 8, 8))])
def test_arrays_go_in_and_out_as_npy(text_dir, tmp_path, output_type, shape):
    latents = np.random.default_rng(0).normal(size=(2, 4, 8, 8)).astype(np.float32)
    np.save(tmp_path / "latents.npy", latents)
    np.save(tmp_path / "embeds.npy", np.concatenate([embed("a bag"), embed("a boot")]))
    np.save(tmp_path / "negative.npy", embed("red"))
    options = ["--prompt-embeds", tmp_path / "embeds.npy", "--negative-prompt-embeds", tmp_path / "negative.npy"]
    options += ["--latents", tmp_path / "latents.npy", "--guidance-scale", "2", "--output-type", output_type]
    assert main(command(text_dir, *options, "-o", tmp_path / "out.npy")) == 0
    got = np.load(tmp_path / "out.npy")
    assert got.shape == shape
    want = Pipeline.from_engine_dir(text_dir, "cpu", threads=1)(
        ["a bag", "a boot"], negative_prompt="red", latents=latents, guidance_scale=2.0, output_type=output_type
    )
    np.testing.assert_array_equal(got, want.images)


def test_class_labels_and_the_default_output(class_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command(class_dir, "--class-labels", "boot, 2", "--class-labels", "bag", "--verify")) == 0
    assert Image.open(tmp_path / "output.png").size == (16, 16)
    first = (tmp_path / "output.png").read_bytes()
    assert main(command(class_dir, "--class-labels", "0,2,1", "--share-weights")) == 0
    assert (tmp_path / "output.png").read_bytes() == first


def test_labels_are_split_at_commas():
    assert parse_labels(("a, 3", "-1")) == ["a", 3, -1]
    assert parse_labels(()) == []
    with pytest.raises(UserError, match="an empty label"):
        parse_labels(("a,,b",))


def npz(path: Path) -> None:
    np.savez(path.with_suffix(".npz"), a=np.zeros(1))
    path.with_suffix(".npz").rename(path)


FILES = {
    "pickle.npy": lambda path: np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True),
    "raw_pickle.npy": lambda path: path.write_bytes(pickle.dumps([1])),
    "text.npy": lambda path: path.write_text("hello"),
    "empty.npy": lambda path: path.write_bytes(b""),
    "cut.npy": lambda path: (np.save(path, np.zeros((1, 4, 8, 8))), path.write_bytes(path.read_bytes()[:300])),
    "several.npy": npz,
    "wrong.npy": lambda path: np.save(path, np.zeros((1, 4, 8, 9), np.float32)),
    "integer.npy": lambda path: np.save(path, np.zeros((1, 4, 8, 8), np.int64)),
    "folder.png": lambda path: path.mkdir(),
}
ERRORS = [
    ("text", "", "prompt: missing"),
    ("text", "--prompt a --class-labels bag", "takes no class labels"),
    ("class", "--prompt a", "prompt: this engine directory takes class labels"),
    ("class", "", "class_labels: missing"),
    ("class", "--class-labels hat", "no class is named 'hat'"),
    ("class", "--class-labels 0,,1", "an empty label"),
    ("class", f"--class-labels {'9' * 5000}", "no class is named '999"),
    ("class", "--class-labels 99", "no class has id 99"),
    ("text", "--prompt a --num-images 0", "--num-images"),
    ("text", "--prompt a --num-images -1", "--num-images"),
    ("text", "--prompt a --seed x", "--seed"),
    ("text", "--prompt a --seed 99999999999999999999", "seed 99999999999999999999"),
    ("text", "--prompt a --guidance-scale 0", "guidance_scale: 0"),
    ("text", "--prompt a --guidance-scale nan", "guidance_scale: nan"),
    ("text", "--prompt a --output-type gif", "--output-type"),
    ("text", "--prompt a --backend quantum", "--backend"),
    ("text", "--prompt a --threads 0", "--threads"),
    ("text", "--prompt a -o {tmp}/out.gif", "out.gif: output type pil is written to .png"),
    ("text", "--prompt a -o {tmp}/out", "output type pil is written to"),
    ("text", "--prompt a --output-type np -o {tmp}/out.png", "output type np is written to .npy"),
    ("text", "--prompt a -o {tmp}/missing/out.png", "does not exist"),
    ("text", "--prompt a -o {tmp}/folder.png", "is a folder"),
    ("text", "--prompt a --latents {tmp}/none.npy", "no such file"),
    ("text", "--prompt a --latents {tmp}", "not a regular file"),
    ("text", "--prompt a --latents {tmp}/pickle.npy", "not a .npy file of numbers"),
    ("text", "--prompt a --latents {tmp}/raw_pickle.npy", "not a .npy file of numbers"),
    ("text", "--prompt a --latents {tmp}/text.npy", "not a .npy file of numbers"),
    ("text", "--prompt a --latents {tmp}/empty.npy", "not a .npy file of numbers"),
    ("text", "--prompt a --latents {tmp}/cut.npy", "not a .npy file of numbers"),
    ("text", "--prompt a --latents {tmp}/several.npy", "holds several arrays"),
    ("text", "--prompt a --latents {tmp}/wrong.npy", "latents: shape (1, 4, 8, 9), needs (1, 4, 8, 8)"),
    ("text", "--prompt a --latents {tmp}/integer.npy", "latents: int64"),
    ("text", "--prompt-embeds {tmp}/wrong.npy", "prompt_embeds: shape (1, 4, 8, 9), needs (prompts, 6, 5)"),
    ("none", "--prompt a", "no manifest.json"),
]


@pytest.mark.parametrize(("which", "line", "message"), ERRORS)
def test_mistakes_are_one_line_and_leave_nothing(
    text_dir, class_dir, tmp_path, capfd, monkeypatch, which, line, message
):
    monkeypatch.chdir(tmp_path)
    for name, make in FILES.items():
        if name in line:
            make(tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    engine_dir = {"text": text_dir, "class": class_dir, "none": tmp_path}[which]
    words = [word.replace("{tmp}", str(tmp_path)) for word in line.split()]
    assert main(command(engine_dir, *words)) == 2
    printed = capfd.readouterr()
    assert message in printed.err
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert printed.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_write_that_fails_keeps_the_old_file(text_dir, tmp_path, monkeypatch, capfd):
    target = tmp_path / "bag.png"
    target.write_bytes(b"old")

    def full(file: io.BufferedWriter, *_: object) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outputs, "_write", full)
    assert main(command(text_dir, "--prompt", "a bag", "-o", target, "--overwrite")) == 2
    assert "bag.png: cannot be written (No space left on device)" in capfd.readouterr().err
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["bag.png"]


def test_a_file_that_exists_is_kept_unless_it_may_be_replaced(text_dir, tmp_path, capsys):
    target = tmp_path / "bag.png"
    for _ in range(3):
        assert main(command(text_dir, "--prompt", "a bag", "-o", target)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bag-1.png", "bag-2.png", "bag.png"]
    assert "bag.png exists: writing bag-2.png (--overwrite replaces it)" in capsys.readouterr().err
    target.write_bytes(b"old")
    assert main(command(text_dir, "--prompt", "a bag", "-o", target, "--overwrite")) == 0
    assert target.read_bytes() == (tmp_path / "bag-1.png").read_bytes()


def test_a_run_that_is_not_finite_has_status_1_and_no_picture(text_dir, tmp_path, capsys):
    for name, shift in (("more", 9), ("less", -9)):
        np.save(tmp_path / f"{name}.npy", embed("") + np.float32(shift))
    given = ["--prompt-embeds", tmp_path / "more.npy", "--negative-prompt-embeds", tmp_path / "less.npy"]
    target = tmp_path / "out.png"
    assert main(command(text_dir, *given, "--guidance-scale", "3.3e38", "-o", target)) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert "launch 1 of 6 (evaluation 0, graph full): the first output that is not finite" in printed.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["less.npy", "more.npy"]


def test_a_prompt_that_is_not_utf8_is_one_line(text_dir, tmp_path, capsys):
    target = tmp_path / "out.png"
    assert main(command(text_dir, "--prompt", os.fsdecode(b"un caf\xe9"), "-o", target)) == 2
    assert capsys.readouterr().err == "error: prompt: not UTF-8 text (byte 0xe9 at character 6); give it in UTF-8\n"
    assert list(tmp_path.iterdir()) == []


def test_interrupted(text_dir, tmp_path, monkeypatch):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "_denoise", stop)
    assert main(command(text_dir, "--prompt", "a bag", "-o", tmp_path / "x.png")) == 130
    assert not list(tmp_path.iterdir())


def test_help_shows_examples(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert 'dipgo-run --engine-dir engines/fashion-sd --prompt "a sneaker"' in printed
    assert "--class-labels" in printed


@pytest.mark.parametrize(("backend", "lazy"), [("cpu", True), ("cuda", False)])
def test_graphs_are_loaded_as_they_are_launched_on_the_cpu_only(text_dir, monkeypatch, backend, lazy):
    made = OnnxRuntimeBackend("cpu", threads=1)
    made.name = backend
    monkeypatch.setattr("dipgo_deploy.runtime.pipeline.create_backend", lambda *args, **options: made)
    assert Pipeline.from_engine_dir(text_dir, backend, load="auto")._loaded.lazy == lazy


def test_lazy_loading_draws_the_same(text_dir, tmp_path, capsys):
    for mode in ("eager", "lazy"):
        assert main(command(text_dir, "--prompt", "a bag", "--load", mode, "-o", tmp_path / f"{mode}.png")) == 0
    assert (tmp_path / "eager.png").read_bytes() == (tmp_path / "lazy.png").read_bytes()


@pytest.mark.parametrize("given", ["nothing.safetensors", "nothing.safetensors:0.5", "x.safetensors:much"])
def test_a_lora_that_is_not_there_is_one_line(text_dir, tmp_path, capsys, given):
    assert main(command(text_dir, "--prompt", "a bag", "--lora", given, "-o", tmp_path / "a.png")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --lora") and error.count("\n") == 1
    assert not (tmp_path / "a.png").exists()


def test_a_picture_says_what_it_was_made_with(text_dir, class_dir, tmp_path, capsys):
    options = ["--prompt", "a bag", "--negative-prompt", "red", "--seed", "7", "--guidance-scale", "3"]
    for suffix in ("png", "jpg", "webp"):
        assert main(command(text_dir, *options, "-o", tmp_path / f"bag.{suffix}")) == 0
    text = Image.open(tmp_path / "bag.png").text["parameters"]
    first, negative, line = text.splitlines()
    assert (first, negative) == ("a bag", "Negative prompt: red")
    values = dict(part.split(": ") for part in line.split(", "))
    assert values["Seed"] == "7" and values["CFG scale"] == "3" and values["Model"] == "toy"
    assert values["Launches"] == "6" and values["Size"] == "{}x{}".format(*Image.open(tmp_path / "bag.png").size)
    for suffix in ("jpg", "webp"):
        comment = Image.open(tmp_path / f"bag.{suffix}").getexif().get_ifd(0x8769)[0x9286]
        assert comment[:8] == b"UNICODE\0" and comment[8:].decode("utf-16-be") == text
    assert main(command(class_dir, "--class-labels", "Boot,1", "-o", tmp_path / "two.png")) == 0
    assert 'Class: "Boot, 1", ' in Image.open(tmp_path / "two.png").text["parameters"]
    assert main(command(text_dir, "--prompt", "a bag", "--no-parameters", "-o", tmp_path / "bare.png")) == 0
    assert not Image.open(tmp_path / "bare.png").text


def rows_file(folder: Path, *rows: dict[str, object]) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_of_prompts_is_a_picture_a_row(text_dir, tmp_path, capsys):
    """Each picture is the one that its row gives alone, however they are put together; what is there stays."""
    file = rows_file(
        tmp_path,
        {"prompt": "a bag"},
        {"prompt": "a boot", "seed": 40, "name": "boot"},
        {"prompt": "a coat", "negative_prompt": "red"},
        {"prompt": "a shirt", "guidance_scale": 1.5},
    )
    folder = tmp_path / "pictures"
    given = ["--prompts", file, "--seed", "5", "-o", folder]
    assert main(command(text_dir, *given, "--shard", "2/2", "--json")) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["drawn"], facts["skipped"]) == (2, 0)
    assert {path.name for path in folder.iterdir()} == {"boot.png", "00003.png"}
    (folder / "boot.png").write_bytes(b"kept")
    assert main(command(text_dir, *given)) == 0
    assert "2 drawn" in (printed := capsys.readouterr().out) and "2 there already (--overwrite draws" in printed
    assert (folder / "boot.png").read_bytes() == b"kept"
    assert main(command(text_dir, *given, "--overwrite")) == 0
    pipeline = Pipeline.from_engine_dir(text_dir, "cpu", threads=1)
    for name, prompt, seed, more in (
        ("00000", "a bag", 5, {}),
        ("boot", "a boot", 40, {}),
        ("00002", "a coat", 7, {"negative_prompt": "red"}),
        ("00003", "a shirt", 8, {"guidance_scale": 1.5}),
    ):
        picture = Image.open(folder / f"{name}.png")
        want = np.asarray(pipeline(prompt, seed=seed, **more).images[0], np.int16)
        assert abs(np.asarray(picture, np.int16) - want).max() <= 1  # another size of the batch rounds otherwise
        assert picture.text["parameters"].startswith(prompt) and f"Seed: {seed}," in picture.text["parameters"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"prompt": "a"}], ["--prompt", "b"], "--prompt: means nothing with --prompts"),
        ([{"prompt": "a"}], ["--num-images", "2"], "--num-images: means nothing with --prompts"),
        ([{"prompt": "a", "steps": 3}], [], "line 1: steps"),
        ([{"prompt": "a"}, {"prompt": "b", "class_label": 1}], [], "row 1 (or one drawn with it): class_labels: this"),
        ([{"prompt": "a", "guidance_scale": 0.5}], [], "row 0 (or one drawn with it): guidance_scale: 0.5"),
        ([{"prompt": "a"}], ["--shard", "3/2"], "--shard 3/2: give i/n"),
        ([{"prompt": "a"}], ["--name-pattern", "{index}.gif"], "output type pil is written to"),
        ([{"prompt": "a"}], ["--name-pattern", "../{index}.png"], "is no name of a file"),
        ([{"prompt": "a"}], ["--name-pattern", "{what}.png"], "--name-pattern {what}.png: 'what'"),
        ([{"prompt": "a"}, {"prompt": "b"}], ["--name-pattern", "x.png"], "rows 0 and 1 would both be x.png"),
    ],
)
def test_wrong_files_of_prompts_draw_nothing(text_dir, tmp_path, capsys, rows, options, message):
    folder = tmp_path / "pictures"
    assert main(command(text_dir, "--prompts", rows_file(tmp_path, *rows), "-o", folder, *options)) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert not folder.exists()
    assert main(command(text_dir, "--prompt", "a", "--shard", "1/2")) == 2
    assert "--shard: means nothing without --prompts" in capsys.readouterr().err

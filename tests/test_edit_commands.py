"""The commands that edit given images, as users type them: their files, going on, and wrong input in one line."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import micro
from test_commands import ROOT, fails, run
from test_editing import photo

CONFIG = "configs/tiny_config.py"
FAST = ["--sampling_steps=3"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Both stages of an untrained model, and two pictures."""
    root = tmp_path_factory.mktemp("edit")
    micro.write_run(micro.image(root))
    micro.write_prior(micro.latent(root))
    (root / "pictures").mkdir()
    for i in range(2):
        photo(root / "pictures" / f"{i}.png", (40, 30), i)
    return root


def command(script: str, root: Path, *extra: str) -> list[str]:
    place = {"run.root_dir": root, "run.experiment": "micro", "run.device": "cpu"}
    return [f"experiments/{script}.py", "--config", CONFIG, *micro.arguments("config", place), *FAST, *extra]


def succeeds(script: str, root: Path, out: Path, *extra: str) -> dict:
    """Run a command; return what its result.json holds."""
    done = run(command(script, root, f"--out_dir={out}", *extra))
    assert done.returncode == 0, done.stderr
    assert "nan" not in done.stdout and str(out) in done.stdout
    return json.loads((out / "result.json").read_text())


def kept(out: Path) -> dict[str, tuple[bytes, int]]:
    """The pictures, and when each was written."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.glob("[0-9]*.png")}


def goes_on(script: str, root: Path, out: Path, *extra: str) -> None:
    """After a kill that left one picture out and one in part, the same command makes these two, as they were."""
    report, sheet, before = ((out / name).read_bytes() for name in ("result.json", "sheet.png", "settings.json"))
    whole = kept(out)
    gone, damaged = sorted(whole)[:2]
    for name in (gone, "result.json", "sheet.png"):
        (out / name).unlink()
    (out / damaged).write_bytes(whole[damaged][0][:-30])
    done = run(command(script, root, f"--out_dir={out}", *extra))
    assert f"2 made, {len(whole) - 2} were there" in done.stdout, done.stderr
    again = kept(out)
    assert {name: content for name, (content, _) in again.items()} == {name: c for name, (c, _) in whole.items()}
    assert {name for name in whole if again[name] == whole[name]} == whole.keys() - {gone, damaged}
    assert ((out / "result.json").read_bytes(), (out / "sheet.png").read_bytes()) == (report, sheet)
    assert (out / "settings.json").read_bytes() == before
    fails(command(script, root, f"--out_dir={out}", *extra, "--inv_snr=0.1"), "holds results of other settings")
    assert kept(out) == again


def shapes(out: Path) -> dict[str, tuple[int, ...]]:
    return {path.name: np.array(Image.open(path)).shape for path in out.glob("[0-9]*.png")}


def test_inpaint(root, tmp_path):
    mask = np.zeros((40, 30), np.uint8)
    mask[10:30, 10:20] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    out = tmp_path / "out"
    result = succeeds("inpaint", root, out, f"--input={root / 'pictures'}", f"--mask={tmp_path / 'mask.png'}",
                      "--seeds=4,9", "--start_step=0.5", "--follow", "--sample_img_size=20x15")  # fmt: skip
    names = {f"00{i}_{i}_seed{seed}.png" for i in range(2) for seed in (4, 9)}
    assert shapes(out) == dict.fromkeys(names, (20, 15, 3))
    assert result["start_step"] == 500 and result["guidance"] == 0.4 and result["see_hole"] is False
    assert [(row["image"], row["seed"]) for row in result["results"]] == [("0.png", 4), ("0.png", 9), ("1.png", 4),
                                                                         ("1.png", 9)]  # fmt: skip
    assert result["mean"].keys() == {"psnr_known", "psnr_hole"}
    with Image.open(root / "pictures" / "0.png") as image:  # known pixels are put back exactly
        given = np.array(image.resize((15, 20), Image.Resampling.LANCZOS))
    made = np.array(Image.open(out / "000_0_seed4.png"))
    known = np.ones((20, 15), bool)
    known[5:15, 5:10] = False
    assert np.array_equal(made[known], given[known]) and not np.array_equal(made[~known], given[~known])
    assert Image.open(out / "sheet.png").width == 4 * 15 * 7 + 3 * 8 + 32


def test_pictures_change_with_the_mask_of_the_same_name(root, tmp_path):
    mask = np.zeros((40, 30), np.uint8)
    changed, given = [], ["--num_images=1", f"--mask={tmp_path / 'mask.png'}", f"--input={root / 'pictures'}"]
    for rows in (slice(10, 30), slice(10, 20)):
        mask[:] = 0
        mask[rows, 10:20] = 255
        Image.fromarray(mask).save(tmp_path / "mask.png")
        succeeds("inpaint", root, tmp_path / "out", *given, "--seeds=3")
        changed.append(kept(tmp_path / "out")["000_0_seed3.png"])
    assert changed[0] != changed[1]
    succeeds("inpaint", root, tmp_path / "out", *given, "--seeds=3-4")
    pictures = kept(tmp_path / "out")
    assert pictures["000_0_seed3.png"] == changed[1] and len(pictures) == 2


def test_an_interrupted_command_says_so_and_keeps_what_it_made(root, tmp_path):
    many = command("generate_recons", root, f"--out_dir={tmp_path}", "--split=train", "--num_images=20")
    started = subprocess.Popen(
        [sys.executable, *many, "--sampling_steps=250"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored by what a shell runs in background
    )
    while started.poll() is None and not kept(tmp_path):
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    said = started.communicate(timeout=60)[1]
    assert started.returncode == 130 and "interrupted; the same command goes on" in said and "Traceback" not in said
    assert kept(tmp_path) and not (tmp_path / "result.json").exists()
    assert not list(tmp_path.glob(".*"))  # no file in part


def test_super_resolution(root, tmp_path):
    extra = ("--split=train", "--num_images=3", "--factor=2", "--ddim_encoding", "--method=posterior")
    result = succeeds("super_resolution", root, tmp_path, *extra)
    assert list(shapes(tmp_path).values()) == [(32, 24, 3)] * 3
    assert result["start_step"] == 999 and result["method"] == "posterior"
    assert result["size"] == [32, 24] and result["input_size"] == [16, 12]
    assert result["mean"].keys() == {"psnr", "ssim"}
    assert Image.open(tmp_path / "sheet.png").width == 3 * 24 * 5 + 2 * 8 + 32
    goes_on("super_resolution", root, tmp_path, *extra)


def test_recons(root, tmp_path):
    result = succeeds("generate_recons", root, tmp_path, f"--input={root / 'pictures' / '1.png'}")
    assert set(shapes(tmp_path)) == {"000_1_random.png", "000_1_code.png"}
    assert {"random_psnr", "code_ssim"} <= result["mean"].keys()
    assert result["sampling"]["steps"] == "3"
    goes_on("generate_recons", root, tmp_path, f"--input={root / 'pictures' / '1.png'}")


def test_by_default_other_settings_go_to_another_folder(root):
    for steps in ("2", "3", "3"):
        done = run([*command("generate_recons", root, "--num_images=1"), f"--sampling_steps={steps}"])
        assert done.returncode == 0, done.stderr
    assert "0 made, 2 were there" in done.stdout
    assert re.search(r"\n1 of (\d+) images; --num_images=\1 for all\n", done.stdout)
    title, *lines = done.stdout.splitlines()[:3]
    assert title.split() == ["decoded", "from", "PSNR", "(dB)", "SSIM"]
    assert [len(line.split()) for line in lines] == [4, 5] and lines[0].startswith("random noise")
    folders = sorted((root / "micro" / "generate_recons").glob("val-*"))
    steps = {json.loads((folder / "result.json").read_text())["sampling"]["steps"] for folder in folders}
    assert len(folders) == 2 and steps == {"2", "3"}


def test_interpolation_of_images(root, tmp_path):
    extra = (f"--input={root / 'pictures'}", "--frames=4", "--animation=gif")
    result = succeeds("interpolate", root, tmp_path, *extra)
    assert len(shapes(tmp_path)) == 4 and result["ends"] == ["0.png", "1.png"]
    with Image.open(tmp_path / "animation.gif") as animation:
        assert animation.n_frames == 6 and animation.size == (12, 16)
    goes_on("interpolate", root, tmp_path, *extra)


def test_interpolation_of_samples(root, tmp_path):
    places = {"config": "micro_sampler", "decoder_config": "micro"}
    stages = [
        flag
        for name, of in places.items()
        for flag in micro.arguments(name, {"run.root_dir": root, "run.experiment": of, "run.device": "cpu"})
    ]
    given = ["experiments/interpolate.py", "--config=configs/tiny_latent_config.py", f"--decoder_config={CONFIG}",
             *stages, *FAST, f"--out_dir={tmp_path}", "--seeds=3,7", "--frames=2", "--sampler=dpmpp",
             "--latents=slerp", "--animation=apng"]  # fmt: skip
    fails([*given, "--config.diffusion.steps=700"], "diffusion.steps is 700")
    done = run(given)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["input"] == "samples of seed 3 and seed 7"
    assert result["sampling"]["steps"] == "logsnr3" and len(shapes(tmp_path)) == 2
    assert (tmp_path / "animation.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("script", "extra", "part"),
    [
        ("inpaint", ["--input=none.png", "--box=1,1,2,2"], "--input is none.png: nothing there"),
        ("inpaint", ["--box=1,1,3,3", "--config.model.nf=24"], "model.nf is 24"),
        ("inpaint", ["--box=1,1,3,3", "--see_hole"], "all equal with --see_hole"),
        ("inpaint", ["--box=1,1,3,3", "--method=posterior", "--guidance=0.4"], "accepted with the method posterior"),
        ("super_resolution", ["--start_step=3"], "accepted: with --ddim_encoding"),
        ("generate_recons", ["--sampler=dpmpp"], "stochastic codes belong to DDIM"),
        ("interpolate", ["--seeds=1,2"], "--seeds, --decoder_config; accepted: both"),
        ("interpolate", ["--decoder_run_weights=best"], "--decoder_run_weights is best; accepted: newest, or with"),
        ("generate_recons", ["--run_weights=best"], "best_weights.safetensors: no such file; accepted: the newest"),
        (
            "generate_recons",
            ["--inv_snr=sharp"],
            "inv_snr is sharp; accepted: a number from 1e-06 to 1e+06, or",
        ),
        ("inpaint", ["--box=0,0,16,12"], "--box is 0,0,16,12: mask has only unknown pixels"),
        ("super_resolution", ["--sampling_steps=1001"], "--sampling_steps: sampling steps are '1001'"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(root, tmp_path, script, extra, part):
    fails(command(script, root, f"--out_dir={tmp_path / 'out'}", *extra), part)
    assert not (tmp_path / "out").exists()

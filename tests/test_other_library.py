"""The baseline of another library: it trains, goes on, and leaves samples that can be scored."""

import json

import pytest

from forked import run

SMALL = ["--config=configs/tiny_config.py", "--config.data.num_images=40", "--config.data.img_size=12",
         "--config.data.img_width=10", "--config.train.batch_size=4", "--config.run.device=cpu", "--dim=4",
         "--dim_mults=1,2", "--num_samples=3", "--sample_batch_size=2", "--sampling_steps=2"]  # fmt: skip


def test_the_baseline_goes_on_and_can_be_scored(tmp_path):
    pytest.importorskip("denoising_diffusion_pytorch")
    for steps, arguments in ((4, ["--config.train.steps=4"]), (5, ["--config.train.steps=5", "--sampling_steps=3"])):
        done = run(["benchmarks/other_library.py", *SMALL, f"--out_dir={tmp_path}", *arguments])
        assert done.returncode == 0, done.stderr
        result = json.loads((tmp_path / "result.json").read_text())
        assert (result["steps"], result["images"]) == (steps, 4 * steps)
        assert f"{result['parameters'] / 1e6:.2f} M parameters" in done.stdout
    drawn = sorted((tmp_path / "samples_3").glob("0*.png"))
    assert len({path.read_bytes() for path in drawn}) == 3
    scored = run(["experiments/calculate_fid.py", f"--samples={tmp_path}/samples_3", *SMALL[:4],
                  "--model=random_features", f"--cache_dir={tmp_path}"])  # fmt: skip
    assert scored.returncode == 0 and "3 images of 12x10" in scored.stdout, scored.stderr

    # Time that has run out ends the training; other settings belong into another folder.
    before = drawn[0].stat().st_mtime_ns
    again = ["benchmarks/other_library.py", *SMALL, f"--out_dir={tmp_path}", "--config.train.steps=9"]
    assert run([*again, "--sampling_steps=3", "--seconds=0.001"]).returncode == 0
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 5
    assert drawn[0].stat().st_mtime_ns == before
    refused = run([*again, "--dim=8"])
    assert refused.returncode == 2 and "network" in refused.stderr


@pytest.mark.parametrize("argument", ["--dim_mults=1,x", "--dim_mults=1,2,2,2"])
def test_what_the_baseline_refuses(tmp_path, argument):
    pytest.importorskip("denoising_diffusion_pytorch")
    done = run(["benchmarks/other_library.py", *SMALL, f"--out_dir={tmp_path}", argument])
    assert done.returncode == 2 and argument.partition("=")[0] in done.stderr and "Traceback" not in done.stderr

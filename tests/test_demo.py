"""The demo: its commands are those of the README, and other weights of a model have another folder."""

import re
import shlex
import shutil

import pytest
from PIL import Image

from experiments import demo
from forked import ROOT
from runtime import saved

OWN = re.compile(r"--(out_dir|((decoder_)?config\.)?run\.root_dir)=.*")  # where results go


@pytest.mark.skipif(not (ROOT / "weights/landscapes-32").is_dir(), reason="weights are not there")
def test_the_demo_runs_the_commands_of_the_readme(tmp_path, monkeypatch):
    called = []

    def run(script, *arguments):
        called.append({script, *(text for text in arguments if not OWN.fullmatch(text))})
        out = dict(text.removeprefix("--").split("=", 1) for text in arguments).get("out_dir")
        if out:
            (tmp_path / out).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(tmp_path / out / "000000.png")

    monkeypatch.setattr(demo, "run", run)
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["demo.py"])
    monkeypatch.chdir(tmp_path)
    demo.main()
    text = (ROOT / "README.md").read_text().partition("## Five minutes")[2].split("```")[1].replace("\\\n", " ")
    lines = [shlex.split(line.replace("config configs", "config=configs"))[1:] for line in text.strip().splitlines()]
    assert [line for line in lines if set(line) not in called] == [] and len(lines) == 4
    assert len(called) == 3 * len(saved.shipped_names()) + 4
    assert (tmp_path / "demo/samples.png").exists() and (tmp_path / "demo/trained.png").exists()


def test_other_weights_draw_into_another_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(saved, "FOLDER", tmp_path)
    (tmp_path / "mine").mkdir()
    names = set()
    for content in (b"a", b"b"):
        (tmp_path / "mine/image.safetensors").write_bytes(content)
        names.add(demo.folder("mine").name)
    shutil.copy(tmp_path / "mine/image.safetensors", tmp_path / "mine/latent.safetensors")
    names.add(demo.folder("mine").name)
    assert len(names) == 3 and all(name.startswith("mine-") for name in names)

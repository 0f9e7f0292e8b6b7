"""Weights & Biases: what it refuses is said before anything is written, and runs do not share an id."""

import sys
import types

import pytest

import micro
from runtime.run_dir import RunDir


class Wandb(types.ModuleType):
    """Stands for the package: notes what runs begin with, and raises what it is given."""

    def __init__(self, fault: Exception | None = None, logged_in: bool | Exception = True) -> None:
        super().__init__("wandb")
        self.fault, self.logged_in, self.begun = fault, logged_in, []

    def login(self) -> bool:
        if isinstance(self.logged_in, Exception):
            raise self.logged_in
        return self.logged_in

    def init(self, **given):
        if self.fault:
            raise self.fault
        self.begun.append(given)
        return types.SimpleNamespace(finish=lambda: None)


def run_dir(root, **changes) -> RunDir:
    return RunDir(
        micro.image(root, {"run.wandb_mode": "online", **{f"run.{k}": v for k, v in changes.items()}}), resume=True
    )


@pytest.mark.parametrize(("logged_in", "changes", "part"), [
    (True, {"name": "a/b"}, "run.name is 'a/b'; accepted by wandb"),
    (True, {"name": ""}, "run.name is ''"),
    (True, {"name": "x" * 129}, "up to 128 characters"),
    (True, {"wandb_dir": "missing"}, "run.wandb_dir is 'missing'"),
    (False, {}, "not logged in"),
    (RuntimeError("api_key not configured\n(no-tty)"), {}, r"not logged in \(api_key not configured \(no-tty\)\)"),
])  # fmt: skip
def test_what_it_would_refuse_is_said_first(monkeypatch, tmp_path, logged_in, changes, part):
    monkeypatch.setitem(sys.modules, "wandb", Wandb(logged_in=logged_in))
    with pytest.raises(ValueError, match=part):
        run_dir(tmp_path, **changes)
    assert not list(tmp_path.iterdir())
    if not changes:
        run_dir(tmp_path, wandb_mode="offline")


def test_a_run_that_it_refuses_leaves_no_file(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", Wandb(RuntimeError("permission\ndenied")))
    with pytest.raises(ValueError, match=r"refuses the run \(permission denied\)"):
        run_dir(tmp_path).start(0)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_equal_names_in_two_folders_are_two_runs_and_one_goes_on(monkeypatch, tmp_path):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for root in ("a", "b", "a"):
        started = run_dir(tmp_path / root, experiment="same name: 1")
        started.start(0)
        started.close()
    first, second, again = (given["id"] for given in wandb.begun)
    assert first == again != second and first.startswith("same-name-1-")
    assert not set(first) & set(":;,#?/' ")

"""Where the weights of a model are: a run, a file, a saved folder, or the name of a model in the folder weights/."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from configs.schema import LatentConfig
from configs.validate import Config
from runtime.stored import config_from, read_header, require_config, weights_path

IMAGE, LATENT = "image.safetensors", "latent.safetensors"  # of a saved model; its sampling options are in the first
FOLDER = Path(__file__).resolve().parents[1] / "weights"


@dataclass(frozen=True)
class Files:
    """The weights of a model: of stage one, and where they are kept together also of stage two."""

    image: Path
    latent: Path | None = None


def shipped_names() -> list[str]:
    """The names of the models in weights/."""
    return sorted(path.parent.name for path in FOLDER.glob(f"*/{IMAGE}"))


def resolve(given: str | Path, weights: str = "newest") -> Files:
    """The files that a user means. What is there as a path is taken as one, before it is looked up as a name.

    Args:
        given: the folder of a run, a folder that `InftyDiff.save` wrote, a file of weights, or the name of a model in
            weights/.
        weights: of a run, "newest" or "best" (`runtime.stored.weights_path`).
    Raises:
        ValueError: for a name that is none of these; says which there are. For weights that a run does not have, and
            for any but the newest of what is not a run.
    """
    path = Path(given).expanduser()
    files = Files(path) if path.is_file() else _saved(path)
    if files is None:
        if _is_name(path):
            raise ValueError(
                f"{given} is no run and no model; accepted: the folder of a run, a file of weights, or {_names()}"
            )
        return Files(weights_path(path, weights))
    if weights != "newest":
        raise ValueError(f"weights is {weights!r}, but {files.image} is not of a run; accepted: newest")
    return files


def saved_files(given: str) -> Files:
    """As `resolve`, of a saved model alone: a folder that `InftyDiff.save` wrote, or a name in weights/."""
    files = _saved(Path(given).expanduser())
    if files is None:
        raise ValueError(f"{given} is no saved model; accepted: a folder that InftyDiff.save wrote, or {_names()}")
    return files


def saved_config(given: str, stage: type[Config]) -> Config:
    """The configuration of a stage of a saved model.

    Its run is called as the folder of the model and lies where runs do by default: commands put their results there.

    Raises:
        ValueError: where there is no such model, or no such stage of it, or its configuration cannot be read.
    """
    files = saved_files(given)
    file = files.latent if stage is LatentConfig else files.image
    if file is None:
        raise ValueError(f"{given} holds no latent model; accepted: a model that was saved with one")
    config = config_from(require_config(read_header(file).get("config"), str(file)), stage, str(file))
    run = type(config.run)(experiment=file.resolve().parent.name, seed=config.run.seed)
    return replace(config, run=run)


def _saved(path: Path) -> Files | None:
    folder = FOLDER / path if _is_name(path) else path
    if not (folder / IMAGE).exists():
        return None
    return Files(folder / IMAGE, folder / LATENT if (folder / LATENT).exists() else None)


def _is_name(path: Path) -> bool:
    return not path.exists() and len(path.parts) == 1


def _names() -> str:
    return f"the name of a model in weights/ ({', '.join(shipped_names()) or 'none is there'})"

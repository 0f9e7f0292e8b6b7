"""The command that follows a training, as its last line shows it."""

from pathlib import Path

from runtime.command import Command, shell_line


def next_of_stage_one(command: Command) -> str:
    """The command that trains stage two on the run of this one."""
    image = command.configs["config"]
    latent = command.place("config", "config", f"{image.run.experiment}_sampler")
    latent[0] = f"--config={_latent_file(Path(command.file('config')))}"
    return shell_line("train_latent_diffusion.py", *latent, *command.place("config", "decoder_config"))


def next_of_stage_two(command: Command, decoder_weights: str = "newest") -> str:
    """The command that draws samples from both runs; decoder_weights: of the autoencoder, whose latents were learnt."""
    places = [*command.place("config", "config"), *command.place("decoder_config", "decoder_config")]
    which = [] if decoder_weights == "newest" else [f"--decoder_run_weights={decoder_weights}"]
    return shell_line("experiments/generate_samples.py", *places, *which, "--num_samples=16")


def _latent_file(image_file: Path) -> Path:
    """The configuration of stage two that goes with one of stage one: of the same name, or of the same data."""
    stem = image_file.name.removesuffix("_config.py")
    files = [image_file.with_name(f"{name}_latent_config.py") for name in (stem, stem.split("_")[0], "ffhq")]
    return next((file for file in files if file.is_file()), Path("configs/ffhq_latent_config.py"))

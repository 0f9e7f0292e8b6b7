"""From frozen configurations to diffusion processes: one place for the names they use."""

import torch

from configs.schema import ImageConfig, LatentConfig, ProcessConfig
from diffusion.losses import Objective
from diffusion.mollifier import IDENTITY, Mollifier
from diffusion.process import DiffusionProcess, Prediction, Variance
from diffusion.schedules import Schedule
from diffusion.timestep_sampling import TIMESTEP_SAMPLERS, Gather, TimestepSampler


def build_image_process(config: ImageConfig) -> DiffusionProcess:
    """The mollified diffusion of images, at the training resolution."""
    diffusion = config.diffusion
    mollifier = Mollifier(diffusion.gaussian_filter_std, config.size, kind=diffusion.mollifier_type)
    return _build_process(config, mollifier, max(config.size), keep_sharp=diffusion.final_estimate != "filter")


def build_latent_process(config: LatentConfig) -> DiffusionProcess:
    """The plain diffusion of latent vectors."""
    return _build_process(config, IDENTITY, None, keep_sharp=False)


def _build_process(
    config: ImageConfig | LatentConfig, mollifier: Mollifier, resolution: float | None, keep_sharp: bool
) -> DiffusionProcess:
    fixed = Variance.FIXED_SMALL if config.model.sigma_small else Variance.FIXED_LARGE
    return DiffusionProcess(
        schedule=Schedule.create(config.diffusion.noise_schedule, config.diffusion.steps, resolution),
        mollifier=mollifier,
        prediction=Prediction(config.diffusion.model_mean_type),
        variance=Variance.LEARNED_RANGE if config.model.learn_sigma else fixed,
        keep_sharp=keep_sharp,
    )


def build_objective(config: ProcessConfig, process: DiffusionProcess) -> Objective:
    """What training minimises."""
    return Objective(process, config.loss_type, config.loss_weight, config.min_snr_gamma)


def build_timesteps(
    config: ProcessConfig, process: DiffusionProcess, device: torch.device, gather: Gather
) -> TimestepSampler:
    """How training draws the steps of a process; device, gather: see `LossAwareTimesteps`."""
    return TIMESTEP_SAMPLERS[config.schedule_sampler](process.schedule.log_snr.to(device), gather)

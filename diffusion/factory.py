"""From frozen configurations to diffusion processes: one place for the names they use."""

import torch

from configs.schema import DiffusionConfig, ImageConfig, LatentConfig, LatentDiffusionConfig
from diffusion.losses import Objective
from diffusion.mollifier import IDENTITY, Mollifier
from diffusion.process import DiffusionProcess, Prediction, Variance
from diffusion.schedules import Schedule
from diffusion.timestep_sampling import TIMESTEP_SAMPLERS, Gather, TimestepSampler


def _variance(learn_sigma: bool, sigma_small: bool) -> Variance:
    if learn_sigma:
        return Variance.LEARNED_RANGE
    return Variance.FIXED_SMALL if sigma_small else Variance.FIXED_LARGE


def build_image_process(config: ImageConfig) -> DiffusionProcess:
    """The mollified diffusion of images, at the training resolution."""
    diffusion = config.diffusion
    return DiffusionProcess(
        schedule=Schedule.create(diffusion.noise_schedule, diffusion.steps, resolution=max(config.size)),
        mollifier=Mollifier(diffusion.gaussian_filter_std, config.size, kind=diffusion.mollifier_type),
        prediction=Prediction(diffusion.model_mean_type),
        variance=_variance(config.model.learn_sigma, config.model.sigma_small),
        keep_sharp=diffusion.final_estimate != "filter",
    )


def build_latent_process(config: LatentConfig) -> DiffusionProcess:
    """The plain diffusion of latent vectors."""
    diffusion = config.diffusion
    return DiffusionProcess(
        schedule=Schedule.create(diffusion.noise_schedule, diffusion.steps),
        mollifier=IDENTITY,
        prediction=Prediction(diffusion.model_mean_type),
        variance=_variance(config.model.learn_sigma, config.model.sigma_small),
    )


def build_objective(config: DiffusionConfig | LatentDiffusionConfig, process: DiffusionProcess) -> Objective:
    """What training minimises."""
    return Objective(process, config.loss_type, config.loss_weight, config.min_snr_gamma)


def build_timesteps(
    config: DiffusionConfig | LatentDiffusionConfig, device: torch.device, gather: Gather
) -> TimestepSampler:
    """How training draws its steps; device, gather: see `LossAwareTimesteps`."""
    return TIMESTEP_SAMPLERS[config.schedule_sampler](config.steps, device, gather)

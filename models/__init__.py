"""Networks: the denoiser of functions, their encoder, and the denoiser of latents."""

"""The denoiser of latents: the MLP with skip connections of Diffusion Autoencoders (Preechakul et al., 2022).

Letters: B batch, D latent, W hidden width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from models.layers import Dropout, LayerNorm, latent_sinusoidal_features

LEAST = 2  # layers, and features of time


class MLPLayer(nn.Module):
    """Dropout(GELU(norm(Linear(h)·(1 + Linear(GELU(condition))))))."""

    def __init__(self, c_in: int, c_out: int, condition_dim: int, dropout: float):
        super().__init__()
        self.linear = nn.Linear(c_in, c_out)
        self.scale = nn.Linear(condition_dim, c_out)
        self.norm = LayerNorm(c_out)
        self.dropout = Dropout(dropout)

    def forward(self, h: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        h = self.linear(h) * (1 + self.scale(F.gelu(condition)))
        return self.dropout(F.gelu(self.norm(h)))


class MLPSkipNet(nn.Module):
    """Latent denoiser: every layer after the first sees the noisy latent again beside the hidden state.

    z_dim: D. hidden: W. num_layers: linear layers in all, at least 2. time_dim: width of the time features.
    out_channels: 2·D for a learned variance, D by default.
    """

    def __init__(
        self,
        z_dim: int,
        hidden: int = 2048,
        num_layers: int = 10,
        time_dim: int = 64,
        dropout: float = 0.0,
        out_channels: int | None = None,
    ):
        super().__init__()
        for name, value in (("num_layers", num_layers), ("time_embed_dim", time_dim)):
            if value < LEAST:
                raise ValueError(f"model.{name} is {value}; accepted: numbers from {LEAST} on")
        self.time_dim = time_dim
        self.time_mlp = nn.Sequential(nn.Linear(time_dim, z_dim), nn.GELU(), nn.Linear(z_dim, z_dim))
        self.in_layer = MLPLayer(z_dim, hidden, z_dim, dropout)
        self.layers = nn.ModuleList(MLPLayer(hidden + z_dim, hidden, z_dim, dropout) for _ in range(num_layers - 2))
        self.out_layer = nn.Linear(hidden + z_dim, out_channels or z_dim)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Prediction (B, D or 2·D) for noisy latents x (B, D) at times t (B,), in thousandths of the process."""
        condition = self.time_mlp(latent_sinusoidal_features(t, self.time_dim).to(x.dtype))  # (B, D)
        h = self.in_layer(x, condition)  # (B, W)
        x = x.to(h.dtype)  # under autocast; beside float32 the hidden state would become that at every layer
        for layer in self.layers:
            h = layer(torch.cat([h, x], dim=1), condition)  # (B, W + D) -> (B, W)
        return self.out_layer(torch.cat([h, x], dim=1))

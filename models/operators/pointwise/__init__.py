"""Normalisation, modulation and MLP of the residual blocks.

`norm_mlp` holds what networks call, and the reference in PyTorch beside it. `triton_norm_mlp` holds the fused operators
and their gradients, `triton_kernels` the kernels they launch and the sizes of their tiles.
"""

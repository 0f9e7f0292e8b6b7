"""The sparse convolution of `model.backend`.

`backend` says what is computed, and what every back end offers. `torch_dense` is the reference in PyTorch. `native`
chooses between this project's kernels, of which each file holds operator and gradient: `cpu` (C, `convolution.c`),
`triton_conv` (Triton, `triton_conv_kernels`), `enlarged` (C, `enlarged.c`, and Triton, `triton_enlarged`), `pairs`
(PyTorch). `library` holds what the back ends on other libraries (`torchsparse`, `spconv`) share.
"""

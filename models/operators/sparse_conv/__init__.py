"""The sparse convolution of `model.backend`.

`backend` says what is computed, and what every back end offers. `torch_dense` is the reference in PyTorch; `native`
chooses between this project's kernels; `library` holds what the back ends on other libraries (`torchsparse`, `spconv`)
share. `models.operators.dispatch` makes them by name.
"""

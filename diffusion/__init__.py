"""The mathematics of ∞-Diff: tensors and numbers in, tensors out; no network, file, flag or clock."""

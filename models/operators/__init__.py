"""What computes networks fast: an operation a folder, each with its reference in PyTorch; `dispatch` chooses."""

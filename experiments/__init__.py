"""Commands of the paper's tables and figures, and what only they use."""

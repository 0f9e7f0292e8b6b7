"""Image sets as uint8 tensors, and the order in which training sees them."""

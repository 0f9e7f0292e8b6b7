"""How good images are: Fréchet and kernel distances, precision and recall, similarity of pairs, nearest neighbours."""

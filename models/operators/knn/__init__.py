"""The nearest present pixels of every node of a grid.

`search` says what is found and is the reference in PyTorch; it takes the kernels where `models.operators.dispatch` has
some. They are in C (`cpu_search` calls `search.c`) and in Triton (`triton_search`, kernel and operator). `pixel_order`
makes the tables that all of them read. Nothing here has a gradient: that of the averages taken over the nearest is in
`models.interpolation`, whose transposed gather is in `search.c` too.
"""

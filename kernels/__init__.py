"""One file an operation: ``x_reference`` in plain torch is what it means, ``_x_kernel`` how a GPU computes it (Triton),
``x`` picks by device and by the table of backends. ``cpu/`` has the ways of a CPU, ``native/`` the C of some of them.

Knows nothing of models, sequences or steps. Each file opens with the legend of its shape suffixes; contiguity
is stated for every argument that needs it.
"""

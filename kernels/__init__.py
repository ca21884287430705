"""One file an operation: arithmetic on tensors, in torch's operations, or compiled from C where that pays (``native``).

Knows nothing of models, sequences or steps. Each file opens with the legend of its shape suffixes; contiguity
is stated for every argument that needs it.
"""

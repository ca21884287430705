"""How operations are computed on a CPU: by torch's operations, or by kernels compiled from C (``../native``).

The operations themselves, and what they mean, are one folder up.
"""

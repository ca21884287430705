"""What a user's program needs: parameters, results and errors.

Owns the public value types. Imports nothing of ours beyond this folder, and neither torch nor ray, so that a light
client can install it alone.
"""

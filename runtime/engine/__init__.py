"""The engine core: what decides which tokens are computed when, and in which KV blocks they stand.

Pure and synchronous: no torch, no threads, no clock. Events go in (requests, results of steps), plans come out.
"""

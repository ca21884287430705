"""Pure decisions about where things go: model facts, memory, and later topology, plans and costs.

Standard library only: numbers in, decisions out. Knows nothing of torch, Ray, sockets or clocks.
"""

"""Communication between ranks: groups, collectives, overlap, expert exchange, KV transport.

Empty so far: it fills when a model is spread over several devices. Collectives will be called nowhere else.
"""

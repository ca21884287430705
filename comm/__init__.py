"""Communication between ranks: groups, collectives, overlap, expert exchange, KV transport.

Reading order: ``mesh`` (who is who), ``collectives`` (what ranks can do together), its implementations, and what is
built on them. Collectives are called nowhere else.
"""

"""Communication between ranks: groups, collectives, overlap, expert exchange, KV transport.

Reading order: ``mesh`` (who is who), ``collectives`` (what ranks can do together), its implementations, and what is
built on them: ``overlap`` runs pieces of a forward pass in turns, the ``overlap_*`` files say where to cut one and what
came of it, ``reduce_norm`` is the sum that they wait for most. Collectives are called nowhere else.
"""

"""Communication between ranks: groups, collectives, overlap, expert exchange, KV transport.

Reading order: ``mesh`` (who is who), ``collectives`` (what ranks can do together), its implementations, and what is
built on them: ``overlap`` runs pieces of a forward pass in turns (``overlap_cost``, ``overlap_split``, ``overlap_waves``
and ``overlap_measure`` say where to cut, ``overlap_meter`` what came of it), ``reduce_norm`` is the sum that they wait
for most. Collectives are called nowhere else.
"""

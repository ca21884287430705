"""Communication between ranks: groups, collectives, overlap, the exchange of experts' rows, the step bus.

Reading order: ``mesh`` (who is who), ``collectives`` (what ranks can do together), its implementations, and what is
built on them: ``overlap`` runs pieces of a forward pass in turns, the ``overlap_*`` files say where to cut one and what
came of it, ``reduce_norm`` is the sum that they wait for most, ``experts`` brings rows to their experts and back.
Collectives are called nowhere else.

Beside them stands the step bus, which moves messages rather than tensors: ``frames`` and ``handshake`` (pure), ``wire``
(a socket), ``step_bus`` (the driver's side), ``step_endpoint`` (a rank's), ``step_listener`` (how they meet).

``kv/`` moves KV from one replica to another.
"""

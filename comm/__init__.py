"""Communication between ranks: groups, collectives, overlap, expert exchange, KV transport.

Reading order: ``mesh`` (who is who), ``collectives`` (what ranks can do together), its implementations, and what is
built on them. Collectives are called nowhere else.

Beside them stands the step bus, which moves messages rather than tensors: ``frames`` and ``handshake`` (pure), ``wire``
(a socket), ``step_bus`` (the driver's side), ``step_endpoint`` (a rank's), ``step_listener`` (how they meet).
"""

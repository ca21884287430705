"""KV on its way from one replica to another: what is agreed, who may write what when, and how bytes cross.

Reading order. Decisions, pure: ``layout`` (do two replicas fit), ``transfer`` (the words: ids, messages, endings),
``sender`` and ``receiver`` (the two ends of a transfer, at the replicas' drivers), ``outgoing`` and ``incoming`` (what
each rank may read and write for them), with ``coverage``, ``parked``, ``endings`` and ``frame`` below. Then what acts:
``transport`` (the protocol), ``memory`` (a rank's KV as bytes), ``streams`` (threads and connections), on which ``tcp``
and ``shm`` stand. ``placement/kv_routes`` says who sends what to whom.
"""

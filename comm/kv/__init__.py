"""KV on its way from one replica to another: what is agreed, who may write what when, and how bytes cross.

Reading order. Decisions, pure: ``layout`` (do two replicas fit), ``transfer`` (the words: ids, messages, endings),
``sender`` and ``receiver`` (the two ends of a transfer, at the replicas' drivers), ``outgoing`` and ``incoming`` (what
each rank may read and write for them), with ``coverage``, ``parked``, ``endings`` and ``frame`` below. Then what acts:
``transport`` (the protocol), ``memory`` (a rank's KV as bytes), ``streams`` (threads and connections), on which ``tcp``
and ``shm`` stand. ``placement/kv_routes`` says who sends what to whom.

Who puts them together, the shell, owes them this. Both machines are ticked several times a lease, never from the step
loop. Actions are carried out in their order, and what a rank reports comes back in its own. A receiving rank opens a
grant before it says so. Blocks go back to their pool where ``release`` says so and nowhere else. ``PeerDown`` at any
rank is ``peer_lost`` at its driver. ``Close`` at a sending rank is ``cancel`` at its transport too. Positions of a
prompt's last block that are not sent hold whatever was there: the engine clears a block that it enters.
"""

"""The shell of the controller: sees the cluster, runs the core (``runtime/reconcile/``), carries out what it asks for.

    cluster.py  what is needed of a platform        rounds.py  one round: look, decide, act

Never on a request's way: replicas and gateways go on without it.
"""

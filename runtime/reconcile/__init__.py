"""The core of the controller: from what is wanted and what is seen to what is to be done.

    desired.py   what the operator asks for          observed.py  what the platform and the drivers report
    memory.py    what is kept from round to round    actions.py   what the shell carries out
    views.py     who is in the cluster, for gateways

    reconcile.py runs the deciders in their order: repair, overdue, drain, surplus, place (with give_way), publish

Pure: it knows no Ray, no sockets, no clock. Every round starts from what is seen, so that a controller that has lost
its memory goes on with the replicas that live.
"""

"""One rank's worker: what runs the model and draws tokens.

Owns a device. It must not know requests' text, routing or the cluster.
"""

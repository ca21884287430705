"""The wire between processes: the engine protocol between gateway and replica, and views from the controller.

Both over gRPC or in one process. Over TCP callers and servers prove to one another that they know the cluster's secret.
"""

"""The wire between gateway and replica: the engine protocol, over gRPC or in one process."""

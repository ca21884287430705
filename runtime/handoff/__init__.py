"""KV on its way, between a replica's driver and its ranks: what the driver decides and what ranks are told to do.

Below ``worker``, which puts it into a process, above ``engine`` and ``rpc``; ``comm/kv`` has machines and transports.
"""

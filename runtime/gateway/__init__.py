"""The gateway: the stateless process between HTTP clients and an engine.

Owns HTTP: routes, bodies, errors as clients see them, server-sent events, admission, API keys, metrics. It tokenizes,
admits, detokenizes and streams. It must not know a model, a device or a scheduler: it speaks to an engine through
``EngineClient`` and in messages.

    SlipstreamError
    └── HttpRefusal    a request refused before it reached the engine    blame: caller
"""

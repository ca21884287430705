"""The runtime: engine, models, worker, text and the ways in (``LLM`` and the command line).

Layers inside, pointing down only: ``cli`` and ``llm`` → shells (``worker``) → cores (``engine``), ``models``, ``text``
→ ``messages``, ``config``, ``clock``.
"""

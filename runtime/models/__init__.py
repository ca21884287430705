"""The models: from a Hugging Face directory to logits.

``registry`` turns config.json into a ``ModelSpec``, ``checkpoint`` and ``weights`` read safetensors into
preallocated parameters, ``decoder`` runs them over a paged KV cache. Knows nothing of scheduling, sampling or
requests.
"""

"""Text on either side of the engine: tokens from text and chats, text from tokens, stop strings.

Owns the libraries ``tokenizers`` and ``jinja2``. It must not know the engine, the model or a device.
"""

"""``slipstream bench serve``: load on any server with OpenAI's API, and how it bore it."""

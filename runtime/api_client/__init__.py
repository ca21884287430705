"""Talking to any server with OpenAI's HTTP API. It must not know Slipstream's own server, nor what answers are for."""

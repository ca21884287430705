"""``slipstream demo``: ``asking`` talks to a server, ``screen`` shows it, ``main`` joins them."""

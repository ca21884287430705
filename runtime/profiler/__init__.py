"""``slipstream profile``: steps of a model measured on the device at hand, as a table for the planner."""

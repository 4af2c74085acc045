"""One machine's instances and router, as processes that start and end together."""

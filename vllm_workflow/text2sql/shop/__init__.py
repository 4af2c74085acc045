"""A synthetic shop: its database, questions about it with gold SQL, and training examples."""

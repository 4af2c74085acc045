"""Loads on real and simulated fleets, and the reports about them."""

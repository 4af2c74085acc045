"""Fleets in virtual time: the policies of `core/` on simulated engines, levels 1 and 2."""

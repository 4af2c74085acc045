"""The process in front of the instances."""

"""Checkpoints that hold the members, are whole or absent, and resume to the bit."""

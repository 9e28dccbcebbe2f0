"""Partial sums whose order does not depend on how a tensor is cut into blocks."""

LANES = 16
"""Partial sums side by side: element c of a row goes to lane c % 16, wherever blocks are cut."""

"""How to compute: knows models and machines, knows no paper's method."""

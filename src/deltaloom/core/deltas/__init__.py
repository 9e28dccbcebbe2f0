"""The kinds of delta, one file each."""

"""Methods that merge deltas of one base; one file each, a family as a table."""

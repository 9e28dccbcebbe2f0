"""Methods that tune a base on examples; one file each."""

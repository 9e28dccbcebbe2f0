"""Methods that choose rows of a pool; one file each."""

"""Methods that measure a model on examples; one file each."""

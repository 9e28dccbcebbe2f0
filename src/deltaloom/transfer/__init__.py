"""Methods that give a base another tokenizer; one file each."""

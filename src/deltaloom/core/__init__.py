"""The nouns: what every verb takes and gives."""

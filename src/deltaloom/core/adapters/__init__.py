"""Adapter kinds that PEFT does not bring, registered with it."""

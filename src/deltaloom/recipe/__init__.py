"""Recipes: steps checked, planned and run."""

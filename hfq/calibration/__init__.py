"""Quantizing with data: run a model block by block on text, watch what its weights read, and choose codes by that."""

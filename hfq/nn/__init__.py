"""Modules that hold packed weights: one Linear, one Embedding, one mixin for fused experts."""

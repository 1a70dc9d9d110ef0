"""Training on packed weights: adapters and what becomes of them."""

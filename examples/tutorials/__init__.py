"""GaLore in your own training loop: one small language model, four ways to write it."""

"""Fine-tuning: which layers learn on, and at which rates."""

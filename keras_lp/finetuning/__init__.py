"""Fine-tuning: which layers keep training, and at which rates."""

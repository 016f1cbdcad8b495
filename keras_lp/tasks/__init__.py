"""What a head predicts: tasks with their losses, metrics and missing labels, and the heads."""

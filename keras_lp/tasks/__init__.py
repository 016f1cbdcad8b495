"""Tasks (what a head predicts, with losses, metrics and missing labels), and the heads."""

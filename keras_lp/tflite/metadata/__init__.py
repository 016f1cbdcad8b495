"""What a file says of itself: labels, thresholds, vocabulary, normalization."""

"""TFLite metadata: labels, thresholds, vocabulary, normalization."""

"""What the benchmark scripts share; a file holds one concept."""

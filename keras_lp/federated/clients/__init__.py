"""Client data: loading, padding, partitioning and describing them."""

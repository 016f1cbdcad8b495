"""What a client is: its data, how they are loaded, padded and partitioned."""

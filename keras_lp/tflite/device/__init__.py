"""What runs on a phone, and the server's half of a federation of phones."""

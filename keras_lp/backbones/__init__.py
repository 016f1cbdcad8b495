"""A name, a file or a model becomes a headless network, frozen as far as wanted."""

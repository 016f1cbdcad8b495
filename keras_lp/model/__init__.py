"""What the builders return: `lp.Model`, how it is put together, and what its `fit` does."""

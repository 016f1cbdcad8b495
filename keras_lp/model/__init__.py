"""`lp.Model`, which the builders return: how it is built, and what its `fit` does."""

"""Transfer learning: a new head on a frozen backbone."""

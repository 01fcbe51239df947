"""Which tokens two models share, and how one's tokens are read by the other."""

"""The target's log-probabilities for training, asked of its server once and kept in a folder."""

"""Measures of unlearning and the pages that show them."""

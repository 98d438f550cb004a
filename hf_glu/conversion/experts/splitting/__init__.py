"""One FFN divided among experts."""

"""The way to the Hub: what is staged, checked and uploaded, and the code that goes along."""

"""What a user may say: the section ``hf_glu`` of a config, and what a stock config says. No torch here."""

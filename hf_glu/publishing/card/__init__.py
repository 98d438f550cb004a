"""Model cards: facts, wording, the template."""

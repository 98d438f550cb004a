"""Model cards: the facts, their wording, and the template."""

"""Properties that random cases are tried against; `python -m recipes.fuzz` runs all of them at length."""

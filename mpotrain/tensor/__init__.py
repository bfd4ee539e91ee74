"""Matrix product operators as mathematics: specs, plans, contractions, decompositions."""

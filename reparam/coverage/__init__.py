"""``reparam coverage``: plan, expand, verify and extract over a list of models, and what became of each of them."""

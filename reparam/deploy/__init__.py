"""Networks on their way out: ``reparam fold`` and ``reparam export``, and the files that other programs run."""

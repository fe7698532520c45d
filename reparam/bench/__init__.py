"""``reparam bench``: what steps, surgery, folding and several processes cost, beside what they have to."""

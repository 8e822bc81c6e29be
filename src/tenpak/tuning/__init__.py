"""Recovery: what stays continuous in a compressed model, tuned towards the original."""

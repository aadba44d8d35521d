"""Studies: arms tuned alike, compared over seeds, and their report (`mols-ds compare`)."""

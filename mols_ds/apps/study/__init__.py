"""Studies: tune arms equally, compare them over seeds, write the report (`mols-ds compare`)."""

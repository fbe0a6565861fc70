"""From pairs to training rows: rewrites by a teacher, hard negatives by an embedder."""

"""Records to verdicts: tables, figures, claims and the report, computed from record folders alone."""

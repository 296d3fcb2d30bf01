"""Everything about a run folder: comparisons, studies, the journal, results."""

"""Everything about a run folder, from its first check to its results.

A run is one `comparison` of several studies, after the checks of `prepare`. A `study` is one tuner with one seed: it
writes every decision into its `journal` before it acts on it, and keeps its `ledger`. `trained_jobs` trains what the
tuner asks for, by the function in `training`, and `trial_store` keeps rounds and checkpoints. `results` writes tables.

A run that was stopped is resumed by running the same comparison again in its folder (`fedtune.resume`). The decisions
and the rounds from before the stop are read from the journal, and the checkpoints hold the weights. `replay` rebuilds
the studies from their journals alone, and `extension` gives a finished run a larger budget.
"""

"""Everything about a run folder, from its first check to its results.

A run is one `comparison` of several studies, after the checks of `prepare`. A `study` is one tuner with one seed: it
writes every decision into its `journal` before it acts on it, and keeps its `ledger`. `trained_jobs` trains what the
tuner asks for, by the function in `training`, and `trial_store` keeps rounds and checkpoints. `results` makes the rows
of the results, and `result_files` writes them.

A run that was stopped is resumed by running the same comparison again in its folder (`fedtune.resume`). The decisions
and the rounds from before the stop are read from the journal, and the checkpoints hold the weights. `replay` rebuilds
the studies from their journals alone, `extension` gives a finished run a larger budget, and `repair` cuts a journal
that a power cut damaged. `lost_clients` says from where on a run goes on without a client.
"""

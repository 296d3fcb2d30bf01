"""Virtual time, simulated devices, and one federation in training.

The `event_loop` of a study asks a tuner for jobs and reports their errors in virtual time, which its `clock` keeps.
`devices` decides which clients take part in a round and how long the round takes; it draws each device from the
`device_distributions` in the settings. `stragglers` draws how long an attempt at a job takes and whether it fails.

A `federation` trains one trial round by round: its Flower `grid` gives the clients' work to an executor, `evaluation`
turns the clients' errors into scores, and `records` describes each round.
"""

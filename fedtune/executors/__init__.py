"""Executors: they run the clients' work in one process, in several worker processes, or in one tensor program.

`choice` makes the executor that the settings name, and `engine` decides whether clients train in a compiled kernel. The
`serial` executor does all work in this process. A `machine` holds the model, the data and the client program, and does
the tasks. `batched` is a machine that trains many clients in one tensor program; the serial executor works with either
of these machines.

The `pool` executor sends tasks to worker processes, and replaces a worker that dies: `blame` says whether its task is
at fault. `workers` keeps the workers alive, `processes` starts and ends a process, `worker` is the program that each of
them runs, and `shared_memory` holds the weights and the updates. `schedule` decides which tasks a worker gets next;
`fair_share` divides the workers among studies that run at once. `watch` finds clients that hang, in the pool and in the
serial executor. `names` is how messages name a task.

Windows has no worker processes. There the modules of the pool can't be imported: `pool`, `blame`, `workers`,
`processes`, `worker` and `shared_memory`.
"""

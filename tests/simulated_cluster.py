"""The simulated workloads of section 3.3.3: workers that take a tuner's jobs, in virtual time."""

import heapq
import itertools


def completions(tuner, num_workers, error_of, *, resumes, until=float("inf"), stretch=lambda job: 1.0):
    """The jobs as they finish, with the time of that; a round takes 1, times what `stretch` says of the job.

    A job resumes its trial where the trial's last job ended, or starts afresh. Everything that ends at one moment is
    told before anything new is asked for.
    """
    now, running, order, trained = 0.0, [], itertools.count(), {}
    while True:
        while len(running) < num_workers and (job := tuner.ask()) is not None:
            before = trained.get(job.trial.number, 0) if resumes else 0
            trained[job.trial.number] = job.rounds
            heapq.heappush(running, (now + (job.rounds - before) * stretch(job), next(order), job))
        if not running or running[0][0] > until:
            return
        now = running[0][0]
        while running and running[0][0] == now:
            job = heapq.heappop(running)[2]
            yield now, job
            tuner.tell(job, error_of(job))

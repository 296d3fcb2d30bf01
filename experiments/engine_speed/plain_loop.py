"""The plain loop: a copy of the model, a DataLoader and an optimiser for each client, a mean of state_dicts.

python plain_loop.py MODEL PLANS
"""

import copy
import sys

import work
from torch import Tensor
from torch.nn.utils import parameters_to_vector


def main(model: str, plans: str) -> None:
    answers = work.take_stdout()
    initial, parts = work.load(model)

    def train(cohort_size: int, rounds: int) -> Tensor:
        module = initial
        for cohort in work.read_plan(plans, model, cohort_size)[:rounds]:
            states = []
            for turn in cohort:
                local = copy.deepcopy(module)
                work.train_plainly(local, parts[turn.client], turn.order)
                states.append(local.state_dict())
            module = copy.deepcopy(module)
            module.load_state_dict({name: sum(state[name] for state in states) / len(states) for name in states[0]})
        return parameters_to_vector(module.parameters())

    work.serve(answers, train)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Train a language model with both objectives: ``python train.py [experiment=...] [key=value ...]``.

``python train.py --help`` lists what can be set, ``python train.py experiment=nld_8b --cfg job`` prints a
configuration. SIGTERM, SIGINT or SIGUSR1 end it with a checkpoint after the step under way, a second one at once.
Exit status: 0 done, 1 the run failed, 2 the configuration was refused, 75 to be started again (stopped by a signal, or
ended because a rank was lost or nothing moved), 128 + n ended by a second signal.
"""

import os
import sys

from nld_train.config.compose import main
from nld_train.config.schema import Config

# Threads of torch's CPU kernels sleep while they wait. Spinning ones are a little faster on an idle machine, but take
# the cores from loader workers and other programs, and a step then needs several times as long. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def run_training(config: Config) -> int:
    # Imported here, so that a refused configuration is answered before torch is loaded.
    from nld_train.training.run import run

    return run(config)


# The guard matters: the checkpoint writer and the data loader start processes that import this file.
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], run_training))

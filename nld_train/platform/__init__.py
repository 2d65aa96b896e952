"""Device, process groups, seeding, and Megatron-Core on the CPU."""

import logging
import warnings

# Megatron warns once per module that Transformer Engine and Apex are absent. What is used instead is printed at the
# start of every run (RunInfo.backends), in one place.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\..*")
logging.getLogger("megatron").setLevel(logging.ERROR)

"""Joint autoregressive and diffusion pretraining of language models on Megatron-Core."""

import logging
import warnings

__version__ = "0.1.0"

# Here, because the filters must stand before Megatron is imported for the first time, by whichever module.
# Megatron warns once per module that Transformer Engine and Apex are absent. What is used instead is printed at the
# start of every run (RunInfo.backends), in one place.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\..*")
# Megatron's own use of torch: renamed collectives, and .grad of tensors that are no leaves.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
warnings.filterwarnings("ignore", category=UserWarning, message=r"The \.grad attribute of a Tensor that is not a leaf")
logging.getLogger("megatron").setLevel(logging.ERROR)

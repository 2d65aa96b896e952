"""Joint autoregressive and diffusion pretraining of language models on Megatron-Core."""

__version__ = "0.1.0"

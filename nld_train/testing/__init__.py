"""What tests and benchmarks share: gloo ranks, slow obvious references, tiny models. Nothing else imports it."""

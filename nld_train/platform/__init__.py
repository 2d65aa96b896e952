"""Device, process groups, seeding, and Megatron-Core on the CPU."""

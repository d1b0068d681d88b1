"""What tests and benchmarks share: the tolerance rule and the makers of inputs."""

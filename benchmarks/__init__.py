"""The benchmark runner, one `bench_<op>.py` an op, and the results that were measured."""

"""The parts of gpu_proof.py: cases, checks, worker processes and results."""

"""What the benchmark programs share: machine, models, workloads, systems, alternating runs."""

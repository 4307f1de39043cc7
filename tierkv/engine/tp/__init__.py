"""Tensor parallelism: one engine, and worker processes that each run a part of the model.

    rank 0        the engine: scheduler, cache, sampler; and the first part of the model
    rank 1..N-1   workers (worker.py): a part of the model, its KV pool and the tiers below that

    group.py      rank 0's side of the workers: start, talk, notice a death, end
    steps.py      a plan as one array of integers, and back
    executor.py   every rank runs the plan; the logits are whole on rank 0
    mover.py      a move is done when all ranks have done it
    tiers.py      what all ranks' tiers have in common
    port.py       a block's bytes, put together and taken apart

Every rank has the same keys in the same slots; only the bytes differ, because a rank holds its own
heads. Commands go to a worker over one socket, in order, so what a worker does to its pool happens
between the same two steps as on rank 0. The ranks talk among themselves only inside a forward pass.
"""

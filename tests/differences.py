"""Prints the largest relative differences to the large-batch fit.

    python -m tests.differences
    python -m tests.differences --replicas 2

With replicas of a `tf.distribute.MirroredStrategy`, beside those of plain Keras
under the same strategy, at the large batch. The truth is one device.
"""

import argparse
import dataclasses

from tests.reference import (
    Problem,
    differences,
    fit_large,
    fit_micro,
    split_the_processor,
)
from tests.strategies import KINDS, OPTIMIZERS, OPTIONS


def cases():
    """Optimizer by optimizer, then feature by feature."""
    for name in OPTIMIZERS:
        yield name, Problem(optimizer=name)
    yield "LossScaleOptimizer", Problem(loss_scale=1024.0)
    for kind in KINDS:
        for execution in ("graph", "xla", "eager"):
            yield f"{kind}, {execution}", Problem(
                kind=kind, execution=execution
            )
    yield "sum, l2", Problem(kind="sum", regularizer="l2")
    for options in OPTIONS[1:]:
        name = ", ".join(f"{k}={v}" for k, v in options)
        yield name, Problem(options=options, optimizer="AdamW")
    yield "schedule", Problem(schedule=True)
    yield "regularizer", Problem(regularizer="l2")
    yield "constraint", Problem(constraint="unit_norm")
    yield "activity regularizer", Problem(add_loss=True)
    yield "frozen layer", Problem(frozen=True)
    yield "variable without gradient", Problem(unused=True)
    yield "micro_batch_size", Problem(cut=True)
    yield "unknown length", Problem(unknown_length=True)
    yield "steps_per_execution=5", Problem(steps_per_execution=5)
    yield "not built", Problem(built=False)
    for policy in ("mixed_float16", "mixed_bfloat16", "bfloat16", "float64"):
        yield policy, Problem(policy=policy, optimizer="SGD")


def cases_of(replicas):
    """With a last batch that leaves all replicas but one without examples."""
    even = {"replicas": replicas, "micro_batch": 2 * replicas}
    fields = {"examples": 2 * 6 * replicas + 1, **even}
    yield "all batches divide", Problem(examples=12 * replicas, **even)
    yield "one example in the last batch", Problem(**fields)
    for name, problem in cases():
        if problem.execution != "xla":
            yield name, dataclasses.replace(problem, **fields)


def plain(problem):
    """Keras under the same strategy, at the large batch."""
    large = dataclasses.replace(
        problem, micro_batch=problem.large_batch, steps=1, cut=False
    )
    return fit_micro(large, callbacks=[])


def weights_off(problem, fit):
    """The largest difference of a weight, or how it failed."""
    try:
        off = differences(fit(problem), fit_large(problem))[0]
    except Exception as error:
        return type(error).__name__[:12]
    return f"{off:.1e}"


def main():
    """Prints a line for each case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--replicas", type=int, default=0)
    replicas = parser.parse_args().replicas
    if replicas:
        split_the_processor()
        print(f"{'weights off by, at 2 epochs':45} {'kaccum':>12} Keras")
        for name, problem in cases_of(replicas):
            ours, keras = (weights_off(problem, f) for f in (fit_micro, plain))
            print(f"{name:45} {ours:>12} {keras}", flush=True)
        return
    print(f"{'case':45} {'weights':>9} {'state':>9} {'history':>9}")
    for name, problem in cases():
        found = differences(fit_micro(problem), fit_large(problem))
        print(f"{name:45} " + " ".join(f"{d:9.1e}" for d in found), flush=True)


if __name__ == "__main__":
    main()

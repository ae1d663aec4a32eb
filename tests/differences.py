"""Prints the largest relative differences to the large-batch fit.

    python -m tests.differences
"""

from tests.reference import Problem, differences, fit_large, fit_micro
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


def main():
    """Prints a line for each case."""
    print(f"{'case':45} {'weights':>9} {'state':>9} {'history':>9}")
    for name, problem in cases():
        found = differences(fit_micro(problem), fit_large(problem))
        print(f"{name:45} " + " ".join(f"{d:9.1e}" for d in found), flush=True)


if __name__ == "__main__":
    main()

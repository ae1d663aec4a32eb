"""What the tests cost: models that are compiled, and runs that are compared.

Tracing a model takes several times as long as training it in a test, so their
number is what makes the tests slow, and it grows unnoticed.
"""

#: Models that were compiled, and of them those whose step is traced.
counts = {"compiled": 0, "traced": 0}
#: Every run that was trained in micro-batches and compared.
runs = set()


def count_models():
    """Counts each model that is compiled from now on."""
    # The process that only adds the counts up does without.
    import keras

    # Keras compares it with that of its own class.
    trainer = next(c for c in keras.Model.__mro__ if "compile" in vars(c))
    compile_plainly = trainer.compile

    def counted(self, *arguments, **options):
        compile_plainly(self, *arguments, **options)
        counts["compiled"] += 1
        is_eager = keras.backend.backend() == "torch" or self.run_eagerly
        counts["traced"] += not is_eager

    trainer.compile = counted


def report():
    """What one process did, as plain values."""
    architectures = {run.architecture for run in runs}
    return {
        **counts,
        "runs": sorted(map(repr, runs)),
        "architectures": sorted(map(repr, architectures)),
    }


def line_of(reports):
    """What all processes did, as a line."""
    compiled, traced = (
        sum(report[name] for report in reports)
        for name in ("compiled", "traced")
    )
    runs, architectures = (
        len({each for report in reports for each in report[name]})
        for name in ("runs", "architectures")
    )
    return (
        f"{compiled} models compiled, {traced} of them traced; {runs} runs of "
        f"{architectures} architectures compared with their large batch"
    )

"""Several processes of PyTorch on one machine, or one: a program for tests.

    python -m tests.processes RANK PROCESSES PORT CASES

trains as the JSON of each case says, one after the other, and prints what came
of them as JSON. Alone, it trains on the large batches.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import warnings

from tests.pages import ROOT

EXAMPLES = 84
SECONDS = 240


def run(processes, cases):
    """What came of each case in each process, in the order of their ranks.

    Args:
        processes: How many there are.
        cases: What they do; see `train`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "tests.processes"]
    running = [
        subprocess.Popen(
            [*program, str(rank), str(processes), str(port), json.dumps(cases)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        done = [each.communicate(timeout=SECONDS) for each in running]
    finally:
        for each in running:
            each.kill()
    for each, (_, errors) in zip(running, done):
        assert each.returncode == 0, errors
    printed = [json.loads(output.splitlines()[-1]) for output, _ in done]
    return list(zip(*printed))


def start(rank, processes, port):
    """Has the processes know each other; counts their all-reduces."""
    from torch import distributed

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    distributed.init_process_group("gloo", rank=rank, world_size=processes)
    original, counted = distributed.all_reduce, []

    def all_reduce(tensor, *args, **kwargs):
        counted.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    distributed.all_reduce = all_reduce
    return counted


def numbers():
    """Inputs, targets and weights."""
    import numpy as np

    rng = np.random.default_rng(0)
    return (
        rng.normal(size=(EXAMPLES, 6)).astype("float32"),
        rng.normal(size=(EXAMPLES, 1)).astype("float32"),
        rng.uniform(0.1, 2.0, EXAMPLES).astype("float32"),
    )


def micro_batches(rank, processes, case):
    """Which examples each micro-batch of a process has, in lists.

    Alone, these are the large batches.
    """
    import numpy as np

    steps, size = case["steps"], case["size"]
    if "lists" in case:
        lists = case["lists"]
        if processes > 1:
            return lists[rank]
        windows = max(-(-len(each) // steps) for each in lists)
        return [
            [
                example
                for each in lists
                for batch in each[i * steps : (i + 1) * steps]
                for example in batch
            ]
            for i in range(windows)
        ]
    if processes == 1 or case.get("cut"):
        size *= steps
    count = case.get("examples", EXAMPLES)
    batches = [range(i, min(count, i + size)) for i in range(0, count, size)]
    if processes == 1:
        return [list(batch) for batch in batches]
    # The first process has fewer, if that is asked for.
    first = case.get("first")
    return [
        (
            np.array_split(batch, processes)[rank].tolist()
            if first is None
            else (
                list(batch[:first])
                if rank == 0
                else np.array_split(batch[first:], processes - 1)[
                    rank - 1
                ].tolist()
            )
        )
        for batch in batches
    ]


def build(case):
    """A model, to be compiled."""
    import keras

    keras.utils.set_random_seed(0)
    if case.get("heads"):
        inputs = keras.Input((6,))
        heads = {n: keras.layers.Dense(1, name=n)(inputs) for n in "ab"}
        return keras.Model(inputs, heads)
    if case.get("limit"):
        return keras.Sequential(
            [keras.Input((6,)), limited(case["limit"]), keras.layers.Dense(1)]
        )
    if case.get("branches"):
        inputs = keras.Input((6,))
        outputs = keras.layers.Dense(1)(inputs) + branch()(inputs)
        return keras.Model(inputs, outputs)
    layers = [
        keras.Input((6,)),
        keras.layers.Dense(8, "tanh", kernel_regularizer="l2"),
        keras.layers.Dense(1),
    ]
    if case.get("normalizes"):
        layers.insert(1, keras.layers.BatchNormalization())
    return keras.Sequential(layers)


def branch():
    """A layer whose weight has a gradient for some examples only."""
    import keras
    from keras import ops

    class Branch(keras.layers.Layer):
        """Computes nothing where no example needs it."""

        def build(self, shape):
            self.kernel = self.add_weight(shape=(shape[-1], 1))

        def call(self, inputs):
            is_wanted = inputs[:, :1] > 0
            is_symbolic = isinstance(inputs, keras.KerasTensor)
            if not is_symbolic and not bool(ops.any(is_wanted)):
                return ops.zeros((inputs.shape[0], 1))
            return ops.cast(is_wanted, "float32") * (inputs @ self.kernel)

    return Branch()


def limited(limit):
    """A layer that runs out of memory for more examples in the first process.

    (Not where a process is alone.)
    """
    import keras
    import torch
    from torch import distributed

    class Limited(keras.layers.Layer):
        """Needs memory."""

        def call(self, inputs, training=None):
            is_symbolic = isinstance(inputs, keras.KerasTensor)
            is_first = (
                distributed.is_initialized() and not distributed.get_rank()
            )
            if training and is_first and not is_symbolic:
                if inputs.shape[0] > limit:
                    raise torch.OutOfMemoryError("no more memory")
            return inputs

    return Limited()


def interrupt():
    """As a machine that is taken away."""
    raise KeyboardInterrupt


def train(rank, processes, case):
    """Trains a model, and returns it, its history, and what it was told.

    Args:
        rank: Which process this is.
        processes: How many there are.
        case: `steps`, `size` of all processes' micro-batches together, and how
            the fit differs: `cut` by `micro_batch_size`; `first`, how many
            examples of a batch the first process has; `lists` of micro-batches;
            a model that `normalizes`, or `branches`, or has two `heads`, or
            a `limit` of memory; one process `stops`; each `validates`; each is
            `killed` after an epoch, and goes on from its `BackupAndRestore`; a
            `whole` loss; a first process that is `silent` and adds nothing;
            `reduction` of the loss, `clipnorm`, `scales` the loss, `skips`
            micro-batches with a NaN, `measures` gradients; `alone`, the
            `micro_batch_size` of a single process.
    """
    import keras
    import numpy as np

    from kaccum import GradientAccumulationCallback

    x, y, weights = numbers()
    if case.get("skips"):
        x[3] = np.nan

    class Batches(keras.utils.PyDataset):
        """A process's part of the data."""

        batches = micro_batches(rank, processes, case)

        def __len__(self):
            return len(self.batches)

        def __getitem__(self, index):
            of = np.array(self.batches[index], "int64")
            if case.get("skips") and processes == 1:
                of = np.setdiff1d(of, case["skips"])
            if case.get("heads"):
                both = {"a": weights[of], "b": weights[::-1][of]}
                return x[of], {"a": y[of], "b": y[of]}, both
            return x[of], y[of], weights[of]

    optimizer = keras.optimizers.Adam(0.01, clipnorm=case.get("clipnorm"))
    if case.get("scales"):
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    reduction = case.get("reduction", "mean_with_sample_weight")
    loss = keras.losses.MeanSquaredError(reduction=reduction)
    model = build(case)
    metrics = None if case.get("heads") else ["mae"]
    model.compile(optimizer, loss, weighted_metrics=metrics)
    options = {"skip_nonfinite": True} if case.get("skips") else {}
    options["log_gradients"] = case.get("measures", False)
    if case.get("whole"):
        options["whole_batch_loss"] = True
    if case.get("cut"):
        callback = GradientAccumulationCallback(micro_batch_size=case["cut"])
    else:
        callback = GradientAccumulationCallback(case["steps"], **options)
    if processes == 1:
        callback = GradientAccumulationCallback(
            micro_batch_size=case.get("alone", 1),
            log_gradients=case.get("measures", False),
        )
    callbacks = [callback]
    if case.get("stops") and rank == 0:
        stop = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: setattr(
                model, "stop_training", True
            )
        )
        callbacks.append(stop)
    validation = {}
    if case.get("validates"):
        # One process has eleven examples, the others sixteen.
        count = 11 if rank == 0 else 16
        validation = {
            "validation_data": (x[:count], y[:count]),
            "validation_batch_size": 8,
        }
    if case.get("killed") and processes > 1:
        folder = tempfile.mkdtemp()
        killing = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: interrupt() if epoch else None
        )
        saving = keras.callbacks.BackupAndRestore(folder)
        with contextlib.suppress(KeyboardInterrupt):
            model.fit(
                Batches(),
                epochs=2,
                shuffle=False,
                verbose=0,
                callbacks=[*callbacks, saving, killing],
            )
        # As a process that starts again has it.
        model = build(case)
        optimizer = type(optimizer).from_config(optimizer.get_config())
        model.compile(optimizer, loss, weighted_metrics=metrics)
        callbacks.append(keras.callbacks.BackupAndRestore(folder))
    is_plain = case.get("plain") or processes == 1 and "alone" not in case
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            history = model.fit(
                Batches(),
                epochs=2,
                shuffle=False,
                verbose=0,
                callbacks=[] if is_plain else callbacks,
                **validation,
            ).history
        except RuntimeError as error:
            if not case.get("whole"):
                raise
            return model, {}, [str(error)]
    if case.get("limit") and processes > 1:
        told = [callback.micro_batch_size]
    else:
        told = [str(w.message) for w in told if w.category is UserWarning]
    return model, history, told


def train_by_hand(rank, processes, case):
    """The same in a loop of one's own, from `docs/devices.rst`."""
    import keras
    import torch
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    from kaccum import GradientAccumulator

    x, y, weights = map(keras.ops.convert_to_tensor, numbers())
    model = build(case)
    model.optimizer = keras.optimizers.Adam(0.01)
    group = None
    if processes > 1:
        group = distributed.group.WORLD
        wrapped = DistributedDataParallel(model)
    accumulator = GradientAccumulator(model.optimizer, process_group=group)
    steps = case["steps"] if processes > 1 else 1
    for i, of in enumerate(micro_batches(rank, processes, case)):
        if processes > 1:
            with wrapped.no_sync():
                outputs = wrapped(x[of])
        else:
            outputs = model(x[of])
        each = weights[of] * torch.square(outputs - y[of])[:, 0]
        loss = each.sum() / weights[of].sum()
        model.zero_grad()
        loss.backward()
        variables = model.trainable_variables
        gradients = [v.value.grad for v in variables]
        if rank or not case.get("silent"):
            accumulator.add(gradients, variables, weights[of].sum())
        if (i + 1) % steps == 0:
            try:
                accumulator.apply()
            except RuntimeError as error:
                if not case.get("silent"):
                    raise
                return model, {}, [str(error)]
    if int(accumulator.count):
        accumulator.apply()
    return model, {}, []


def main():
    """What one process does."""
    rank, processes, port, cases = sys.argv[1:]
    rank, processes = int(rank), int(processes)
    counted = start(rank, processes, port) if processes > 1 else []
    found = []
    for case in json.loads(cases):
        counted.clear()
        how = train_by_hand if case.get("by_hand") else train
        model, history, told = how(rank, processes, case)
        found.append(
            {
                "weights": [w.ravel().tolist() for w in model.get_weights()],
                "history": history,
                "told": told,
                "updates": int(model.optimizer.iterations),
                "all_reduces": [*counted],
            }
        )
    print()
    print(json.dumps(found), flush=True)
    if processes > 1:
        from torch import distributed

        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()

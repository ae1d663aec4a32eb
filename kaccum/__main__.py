"""Trains one network three ways on real data and compares the results.

A large batch, kaccum's micro-batches, and Keras's own
`gradient_accumulation_steps`, all from the same start on the UCI handwritten
digits. The learning rate falls with each update to zero, and the digits 8 and 9
count four times. Exits with 1 when kaccum's run is not the large-batch run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import platform
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from kaccum.backends import backend
from kaccum.callback import GradientAccumulationCallback
from kaccum.shortage import UPDATES, run_out

# Rounding differs between batch sizes and grows with each update: to 5e-7 on a
# processor. A wrongly weighted update is off by about the learning rate.
TOLERANCE = 1e-4
TITLE = "kaccum: one network, trained three ways on handwritten digits"
LARGE, KACCUM, KERAS = "large batch", "kaccum", "Keras's own"
#: How often an example counts, by its digit.
WEIGHTS = {digit: 4.0 if digit >= 8 else 1.0 for digit in range(10)}
#: Why the third run is another one, and when it is not.
FAIR = (
    "Keras's own steps the schedule with each micro-batch, so the learning "
    "rate is zero after 1/{steps} of the run, and it takes a mean of the "
    "micro-batches' weighted means. With a constant rate, equal weights and "
    "epochs of whole windows it is the large batch, too."
)


class Run(NamedTuple):
    """One fit: its history, and the weights after each epoch.

    Args:
        updates: How many there were.
        history: As of `fit`.
        weights: After each epoch.
        seconds: Of each epoch.
        peak: The most bytes that the device held, or `None` if it does not
            tell.
        found: The `micro_batch_size` at the end, if it was asked for.
    """

    updates: int
    history: dict[str, list[float]]
    weights: list[list[np.ndarray]]
    seconds: list[float]
    peak: int | None = None
    found: int | None = None


class _Recorder(keras.callbacks.Callback):
    """Prints progress, and keeps weights and times, epoch by epoch."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.weights: list[list[np.ndarray]] = []
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._started = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds.append(time.perf_counter() - self._started)
        self.weights.append(self.model.get_weights())
        print(
            f"{self.name:12} epoch {epoch + 1:2}/{self.params['epochs']}  "
            f"loss {logs['loss']:.6f}  accuracy {logs['accuracy']:.4f}",
            flush=True,
        )


def load_digits(devices: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """1,797 images of 8 x 8 pixels in [0, 1], and their digits.

    On JAX so many that `devices` divide the last batch, too: Keras asks for it.
    """
    from sklearn.datasets import load_digits as load

    digits = load()
    count = len(digits.target)
    if keras.backend.backend() == "jax":
        count -= count % devices
    images = digits.images[:count, ..., None].astype("float32") / 16.0
    return images, digits.target[:count]


def build_model() -> keras.Model:
    """A small convolutional network, always with the same weights."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", activation="gelu"),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, padding="same", activation="gelu"),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )


def build_compiled_model(
    name: str, options: argparse.Namespace, examples: int
) -> keras.Model:
    """The network with its optimizer, which accumulates for `KERAS`.

    Args:
        name: `LARGE`, `KACCUM` or `KERAS`.
        options: The parsed command line.
        examples: How many an epoch has.
    """
    model = build_model()
    optimizer = keras.optimizers.get(options.optimizer)
    config = optimizer.get_config()
    updates = options.epochs * -(-examples // options.batch_size)
    config["learning_rate"] = keras.optimizers.schedules.CosineDecay(
        config["learning_rate"], updates
    )
    if name == KERAS and options.steps > 1:
        config["gradient_accumulation_steps"] = options.steps
    optimizer = type(optimizer).from_config(config)
    optimizer.build(model.trainable_variables)
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=options.jit or "auto",
    )
    return model


def train(name: str, options: argparse.Namespace) -> Run:
    """Trains the network one of the three ways.

    Args:
        name: `LARGE`, `KACCUM` or `KERAS`.
        options: The parsed command line.
    """
    x, y = load_digits(options.replicas)
    recorder = _Recorder(name)
    callbacks: list[keras.callbacks.Callback] = [recorder]
    batch_size = options.batch_size
    is_cut = name == KACCUM and options.micro_batch_size is not None
    if name != LARGE and not is_cut:
        batch_size //= options.steps
    if is_cut:
        size = options.micro_batch_size
        ours = GradientAccumulationCallback(micro_batch_size=size)
        callbacks.append(ours)
    elif name == KACCUM:
        callbacks.append(GradientAccumulationCallback(options.steps))
    is_shared = name == KACCUM and options.replicas > 1
    backend().forget_peak_memory()
    with options.devices.scope() if is_shared else contextlib.nullcontext():
        model = build_compiled_model(name, options, len(x))
        # The same order of examples in all three.
        keras.utils.set_random_seed(1)
        history = model.fit(
            x,
            y,
            batch_size=batch_size,
            epochs=options.epochs,
            callbacks=callbacks,
            class_weight=WEIGHTS,
            verbose=0,
        ).history
    found: Any = ours.micro_batch_size if is_cut else None
    if is_cut and size == "auto":
        print(f"kaccum: micro-batches of {found} examples fit in memory")
    updates = int(keras.ops.convert_to_numpy(model.optimizer.iterations))
    peak = backend().peak_memory()
    return Run(
        updates, history, recorder.weights, recorder.seconds, peak, found
    )


def largest_difference(
    weights: Sequence[np.ndarray], truth: Sequence[np.ndarray]
) -> float:
    """Largest difference in any weight, relative to its array's largest."""
    return max(
        float(np.max(np.abs(w - t)) / np.max(np.abs(t)))
        for w, t in zip(weights, truth)
    )


def table(runs: dict[str, Run]) -> str:
    """The comparison, a line for each run."""
    head = (
        f"{'run':12} {'updates':>7} {'loss':>9} {'accuracy':>8} "
        f"{'weights off by':>14} {'s/epoch':>8}"
    )
    lines = [head, "-" * len(head)]
    for name, run in runs.items():
        off = largest_difference(run.weights[-1], runs[LARGE].weights[-1])
        lines.append(
            f"{name:12} {run.updates:7} {run.history['loss'][-1]:9.6f} "
            f"{run.history['accuracy'][-1]:8.4f} {off:14.1e} "
            f"{np.median(run.seconds):8.2f}"
        )
    return "\n".join(lines)


def difference(ours: Run, truth: Run) -> float:
    """How far a run is from the large batch's: its weights, and its losses."""
    losses = [[np.array(run.history["loss"])] for run in (ours, truth)]
    return max(
        largest_difference(ours.weights[-1], truth.weights[-1]),
        largest_difference(*losses),
    )


def is_large(ours: Run, truth: Run) -> bool:
    """Whether a run is the large batch's, to rounding."""
    is_near = difference(ours, truth) <= TOLERANCE
    return is_near and ours.updates == truth.updates


def auto_oom(options: argparse.Namespace) -> dict[str, Any]:
    """Has memory run out; what came of it, and whether it is as it must be."""
    found, weights, truth = run_out(
        *load_digits(), batch_size=options.batch_size
    )
    found["difference"] = largest_difference(weights, truth)
    print(
        f"{found['pixels']} x {found['pixels']} pixels: no memory for "
        f"{options.batch_size} examples ({found['said']}); 'auto' found "
        f"micro-batches of {found['micro_batch_size']}; weights off by "
        f"{found['difference']:.1e}"
    )
    is_near = found["difference"] <= TOLERANCE
    is_smaller = found["micro_batch_size"] < options.batch_size
    are_all_made = found["updates"] == UPDATES
    found["is_the_large_batch"] = is_near and is_smaller and are_all_made
    return found


def report(
    runs: dict[str, Run],
    options: argparse.Namespace,
    found: dict[str, Any] | None,
) -> bool:
    """Writes what came of each way to ask into `options.report`, as JSON.

    Args:
        runs: By what they are called.
        options: The parsed command line.
        found: What `auto_oom` returned, if it was asked for.

    Returns:
        Whether each is the large batch.
    """
    ours = {}
    for size in (None, options.batch_size // options.steps, "auto"):
        name = "steps" if size is None else f"micro_batch_size={size!r}"
        asked = argparse.Namespace(**vars(options))
        asked.micro_batch_size = size
        is_there = size == options.micro_batch_size
        ours[name] = runs[KACCUM] if is_there else train(KACCUM, asked)
    truth = runs[LARGE]
    written = {
        "device": backend().device_name(),
        "versions": {
            name: sys.modules[name].__version__
            for name in ("keras", "numpy", keras.backend.backend())
        },
        "python": platform.python_version(),
        "tolerance": TOLERANCE,
        "runs": {
            name: {
                "difference": difference(run, truth),
                "is_the_large_batch": is_large(run, truth),
                "updates": run.updates,
                "seconds": run.seconds,
                "peak_bytes": run.peak,
                "micro_batch_size": run.found,
            }
            for name, run in {
                LARGE: truth,
                **ours,
                KERAS: runs[KERAS],
            }.items()
        },
    }
    if found is not None:
        written["auto_oom"] = found
    with open(options.report, "w") as file:
        json.dump(written, file, indent=1)
    print(f"written into {options.report}")
    return all(is_large(run, truth) for run in ours.values())


def plot(runs: dict[str, Run], path: str) -> None:
    """Draws the loss curves and the weight differences into `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Large letters: it is looked at on telephones, too.
    with pyplot.rc_context({"font.size": 13}):
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(9, 4), layout="constrained"
        )
    styles: dict[str, dict[str, Any]] = {
        LARGE: {"color": "C0", "linewidth": 6, "alpha": 0.4},
        KACCUM: {"color": "C1", "marker": "."},
        KERAS: {"color": "C2", "marker": ".", "linestyle": "--"},
    }
    for name, run in runs.items():
        epochs = np.arange(1, len(run.weights) + 1)
        left.plot(epochs, run.history["loss"], label=name, **styles[name])
        if name == LARGE:
            continue
        off = [
            largest_difference(w, t)
            for w, t in zip(run.weights, runs[LARGE].weights)
        ]
        right.plot(epochs, off, label=name, **styles[name])
    left.set(
        title="Loss, with a falling\nlearning rate",
        xlabel="epoch",
        ylabel="nats",
        ylim=(0, None),
    )
    right.set(
        title="How far the weights are\nfrom the large batch's",
        xlabel="epoch",
        ylabel="largest relative difference",
        yscale="log",
    )
    left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m kaccum", description=__doc__
    )
    add = parser.add_argument
    add("--batch-size", type=int, default=64, help="examples in an update")
    add("--steps", type=int, default=8, help="micro-batches in an update")
    add(
        "--micro-batch-size",
        type=_size,
        metavar="SIZE",
        help="have kaccum cut the large batch into micro-batches of at most "
        "SIZE examples, or 'auto', instead of adding up --steps of them",
    )
    add(
        "--replicas",
        type=int,
        default=1,
        help="train kaccum's run on so many GPUs, or parts of the processor "
        "(MirroredStrategy, on JAX DataParallel)",
    )
    add("--epochs", type=int, default=6)
    add("--optimizer", default="adam", help="a name in keras.optimizers")
    add("--jit", action="store_true", help="compile with XLA")
    add("--plot", metavar="FILE", help="draw the comparison into FILE")
    add("--device", metavar="NAME", help="train there, as on 'gpu:0'")
    add(
        "--report",
        metavar="FILE",
        help="train by steps, by a micro-batch size and by 'auto', and write "
        "what came of it into FILE, as JSON",
    )
    add(
        "--auto-oom",
        action="store_true",
        help="on a GPU: have its memory run out at the whole batch, on larger "
        "images, and 'auto' find a size that fits",
    )
    options = parser.parse_args(arguments)
    for name in ("batch_size", "steps", "epochs", "replicas"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be >= 1")
    if options.batch_size % options.steps:
        parser.error("--batch-size must be a multiple of --steps")
    if options.auto_oom and UPDATES * options.batch_size > 1797:
        parser.error(f"--auto-oom needs {UPDATES} batches of 1,797 examples")
    if options.batch_size // options.steps % options.replicas:
        parser.error("--replicas must divide a micro-batch")
    return options


def _size(text: str) -> int | str:
    size = text if text == "auto" else int(text)
    if isinstance(size, int) and size < 1:
        raise ValueError
    return size


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison.

    Returns:
        0 if kaccum's run is the large-batch run, 1 if it is not.
    """
    options = parse(arguments)
    missing = [
        package
        for module, package in (
            ("sklearn", "scikit-learn"),
            *([("matplotlib", "matplotlib")] if options.plot else []),
        )
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        print(
            f"The demo needs {' and '.join(missing)}, which "
            "`pip install kaccum[demo]` installs.",
            file=sys.stderr,
        )
        return 2
    if options.replicas > 1:
        options.devices = backend().devices(options.replicas)
    name = options.device
    if keras.backend.backend() == "torch" and (name or "").startswith("cpu"):
        # To PyTorch "cpu:0" is another device: weights would be copies.
        name = "cpu"
    place = contextlib.nullcontext() if name is None else keras.device(name)
    with backend().full_precision(), place:
        return compare(options)


def compare(options: argparse.Namespace) -> int:
    """Trains the three ways; what `main` returns."""
    # A framework that begins to use a device tells of its memory then.
    device = backend().device_name()
    if options.auto_oom and backend().peak_memory() is None:
        print(
            "`--auto-oom` needs a GPU, whose memory can run out without harm. "
            f"Received: {device}. Leave it out.",
            file=sys.stderr,
        )
        return 2
    # Below what a framework writes when it starts.
    print(f"\n{TITLE}\n{'=' * len(TITLE)}")
    print(
        f"device: {device}; Keras {keras.__version__} on "
        f"{keras.backend.backend()}; "
        f"{len(load_digits(options.replicas)[0])} examples; "
        f"{options.optimizer}, updates of "
        f"{options.batch_size} = {options.steps} micro-batches of "
        f"{options.batch_size // options.steps}"
    )
    if options.micro_batch_size is not None:
        print(f"kaccum: micro_batch_size={options.micro_batch_size!r}")
    if options.replicas > 1:
        print(f"kaccum: on {options.replicas} replicas")
    runs = {name: train(name, options) for name in (LARGE, KACCUM, KERAS)}
    print(f"\n{table(runs)}\n")
    if options.steps > 1:
        print(textwrap.fill(FAIR.format(steps=options.steps), 80))
    if options.plot:
        plot(runs, options.plot)
        print(f"drawn into {options.plot}")
    is_same = is_large(runs[KACCUM], runs[LARGE])
    found = auto_oom(options) if options.auto_oom else None
    if found is not None:
        is_same = is_same and found["is_the_large_batch"]
    if options.report:
        is_same = report(runs, options, found) and is_same
    print(f"kaccum's run is {'' if is_same else 'NOT '}the large-batch run")
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main())

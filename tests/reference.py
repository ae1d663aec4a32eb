"""The problems that are tested, and their oracle, the plain large-batch fit.

Nothing of kaccum is used here but `kaccum.testing` and devices. Models are
compiled once for each architecture, and the oracle is trained once for each
large batch: both are kept, as compiling is what takes time.
"""

import contextlib
import dataclasses
import functools

import keras
import numpy as np

from kaccum import testing
from kaccum.backends import backend
from kaccum.testing import differences, result_of
from tests import counting
from tests.backends import BACKEND, compile_options, of_unknown_length, tf

__all__ = ["differences", "result_of"]

TOKENS, LENGTH, FEATURES, CLASSES = 7, 5, 4, 3

CLASS_WEIGHT = {0: 0.5, 1: 2.0, 2: 1.25}
OF_TOKENS = ("mask", "mask_mean_with_sample_weight", "sum_of_tokens")


@dataclasses.dataclass(frozen=True)
class Problem(testing.Run):
    """A whole training run, small enough for a test.

    `kind` says how the loss is reduced: one of `tests.strategies.KINDS`.
    """

    examples: int = 18
    micro_batch: int = 4
    steps: int = 3
    epochs: int = 2
    kind: str = "mean"
    token_weights: bool = False
    optimizer: str = "Adam"
    options: tuple = ()
    schedule: bool = False
    loss_scale: float = 0.0
    regularizer: str | None = None
    constraint: str | None = None
    add_loss: bool = False
    frozen: bool = False
    unused: bool = False
    policy: str = "float32"
    execution: str = "graph"
    steps_per_execution: int = 1
    unknown_length: bool = False
    validation: bool = False
    built: bool = True
    seed: int = 0
    # Of a strategy: 0 is none, 1 a `OneDeviceStrategy`.
    replicas: int = 0

    @property
    def architecture(self):
        """The problem less its run: what is compiled, and once (law 10)."""
        return dataclasses.replace(self, **_RUN)

    @property
    def truth(self):
        """The run that this one must equal: a large batch an update.

        How it is cut, compiled, fed and spread must not be seen.
        """
        return dataclasses.replace(
            self,
            micro_batch=self.large_batch,
            steps=1,
            cut=False,
            execution="eager",
            steps_per_execution=1,
            unknown_length=False,
            built=True,
            replicas=0,
        )


# What can change from fit to fit without another compilation.
_RUN = {
    field.name: field.default
    for field in dataclasses.fields(Problem)
    if field.name in {each.name for each in dataclasses.fields(testing.Run)}
    or field.name in ("unknown_length", "validation", "seed")
}


def tolerance(problem):
    """How far rounding may move a weight, relative to its array's largest."""
    if problem.policy.startswith("mixed_"):
        # The layers compute in half precision, on batches of other sizes.
        dtype = problem.policy.removeprefix("mixed_")
        return testing.tolerance(problem.steps, dtype) / 2
    return testing.tolerance(problem.steps, problem.policy)


def data(problem):
    """Inputs, targets and sample weights, always the same for a problem."""
    rng = np.random.default_rng(problem.seed)
    n = problem.examples
    if problem.kind in OF_TOKENS:
        x = rng.integers(1, TOKENS, (n, LENGTH)).astype("int32")
        lengths = rng.integers(0, LENGTH + 1, n)
        x[np.arange(LENGTH) >= lengths[:, None]] = 0
        y = rng.integers(0, CLASSES, (n, LENGTH)).astype("int32")
    else:
        x = rng.normal(size=(n, FEATURES)).astype("float32")
        y = rng.integers(0, CLASSES, n).astype("int32")
    weighted = problem.kind in ("sample_weight", "mean_with_sample_weight")
    w = rng.uniform(0, 2, n).astype("float32") if weighted else None
    if problem.token_weights and problem.kind in OF_TOKENS:
        w = rng.uniform(0, 2, (n, LENGTH)).astype("float32")
    return x, y, w


def build_optimizer(problem):
    """The optimizer, its learning rate large enough for visible updates."""
    options = dict(problem.options)
    options.setdefault("learning_rate", 0.02)
    if problem.schedule:
        options["learning_rate"] = keras.optimizers.schedules.ExponentialDecay(
            options["learning_rate"], decay_steps=2, decay_rate=0.5
        )
    optimizer = getattr(keras.optimizers, problem.optimizer)(**options)
    if problem.loss_scale:
        optimizer = keras.optimizers.LossScaleOptimizer(
            optimizer, initial_scale=problem.loss_scale
        )
    return optimizer


def split_the_processor():
    """Makes devices for the replicas, where there are no GPUs."""
    if BACKEND == "jax":
        backend().devices(4)
    if BACKEND != "tensorflow":
        return
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * 3,
    )


def strategy_of(replicas, first=1):
    """Where a problem is trained, on GPUs if there are as many.

    Args:
        replicas: As in `Problem`.
        first: The number of the device of a single replica.
    """
    if replicas == 0:
        return tf.distribute.get_strategy()
    return _strategy_of(replicas, first if replicas == 1 else 0)


@functools.cache
def _strategy_of(replicas, first):
    if replicas == 1:
        return tf.distribute.OneDeviceStrategy(f"{_kind()}:{first}")
    # Two strategies' collectives would meet each other (TensorFlow 2.21).
    ops = tf.distribute.ReductionToOneDevice() if replicas == 3 else None
    return tf.distribute.MirroredStrategy(
        [f"{_kind()}:{i}" for i in range(replicas)], cross_device_ops=ops
    )


def _kind():
    return "GPU" if len(tf.config.list_logical_devices("GPU")) > 2 else "CPU"


def scope_of(problem):
    """Where a problem's variables are made."""
    if problem.replicas == 0:
        return contextlib.nullcontext()
    # XLA compiles for the first device of a kind only (TensorFlow 2.21).
    first = 0 if problem.execution == "xla" else 1
    return strategy_of(problem.replicas, first).scope()


def build_model(problem, optimizer=None):
    """A new compiled model of a problem, always with the same weights."""
    with scope_of(problem):
        return _compiled(_layers_of(problem), problem, optimizer)


class Models:
    """The models that were compiled already, one for each architecture."""

    def __init__(self):
        self._kept = {}

    def forget(self):
        """Has each be compiled anew."""
        self._kept.clear()

    @contextlib.contextmanager
    def lent(self, problem):
        """The problem's model as it was when it was new.

        Whatever raises meanwhile, the model is not used again.
        """
        model = self._kept.pop(problem.architecture, None)
        if model is None:
            model = build_model(problem)
        else:
            set_back(model, problem)
        yield model
        if problem.built:
            self._kept[problem.architecture] = model


MODELS = Models()
# Of the oracle, which must never have met kaccum.
ORACLES = Models()


def set_back(model, problem):
    """Gives a trained model all first values, also of its optimizer."""
    with scope_of(problem):
        optimizer = build_optimizer(problem)
        if problem.policy == "mixed_float16" and not problem.loss_scale:
            # As `compile` does.
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        optimizer.build(model.trainable_variables)
    first = _first_values(problem.architecture, problem.seed)
    set_values(model, [*first, *_values(optimizer.variables)])


@functools.cache
def _first_values(architecture, seed):
    problem = dataclasses.replace(architecture, seed=seed)
    return _values(_layers_of(problem).variables)


def variables_of(model):
    """All that training changes, also of the optimizer, which is built."""
    return [*model.variables, *model.optimizer.variables]


def values_of(model):
    """The values of `variables_of`."""
    return _values(variables_of(model))


def set_values(model, values):
    """Sets all of `variables_of`."""
    for variable, value in zip(variables_of(model), values, strict=True):
        variable.assign(value)


def _values(variables):
    return [keras.ops.convert_to_numpy(variable) for variable in variables]


def _layers_of(problem):
    """The model, not compiled."""
    keras.utils.set_random_seed(problem.seed)
    layers = keras.layers
    options = {
        "kernel_regularizer": problem.regularizer,
        "kernel_constraint": problem.constraint,
        "activation": "tanh",
    }
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(problem.policy)
    try:
        if problem.kind in OF_TOKENS:
            first = layers.Embedding(TOKENS, 4, mask_zero=True)
            shape, dtype = (LENGTH,), "int32"
        else:
            first = layers.Dense(4, activation="tanh")
            shape, dtype = (FEATURES,), "float32"
        first.trainable = not problem.frozen
        stack = [first, layers.Dense(5, **options)]
        if problem.add_loss:
            stack.append(_AddsLoss())
        if problem.unused:
            stack.append(_Unused())
        stack.append(layers.Dense(CLASSES))
        if problem.built:
            stack.insert(0, keras.Input(shape, dtype=dtype))
        return keras.Sequential(stack)
    finally:
        keras.config.set_dtype_policy(before)


def _compiled(model, problem, optimizer):
    reduction = {
        "sum": "sum",
        "sum_of_tokens": "sum",
        "mean_with_sample_weight": "mean_with_sample_weight",
        "mask_mean_with_sample_weight": "mean_with_sample_weight",
    }.get(problem.kind, "sum_over_batch_size")
    model.compile(
        optimizer=optimizer or build_optimizer(problem),
        loss=keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction=reduction
        ),
        metrics=["accuracy"],
        # Of logits: by its name alone it would take them for probabilities, and
        # logarithms of what is cut at 0 show rounding a hundred times as large.
        weighted_metrics=[
            keras.metrics.SparseCategoricalCrossentropy(
                "sparse_categorical_crossentropy", from_logits=True
            )
        ],
        **compile_options(problem.execution, problem.steps_per_execution),
    )
    return model


@keras.saving.register_keras_serializable("kaccum_tests")
class _Unused(keras.layers.Layer):
    """Has a variable that never gets a gradient."""

    def __init__(self, **options):
        super().__init__(**options)
        self.supports_masking = True

    def build(self, shape):
        self.unused = self.add_weight(shape=(2,), name="unused")

    def call(self, inputs):
        return inputs


class _AddsLoss(keras.layers.Layer):
    """Adds a loss that is a mean over the examples."""

    def __init__(self, **options):
        super().__init__(**options)
        self.supports_masking = True

    def call(self, inputs):
        self.add_loss(0.1 * keras.ops.mean(keras.ops.square(inputs)))
        return inputs


def fit_large(problem, model=None):
    """The truth: one batch an update, and no callback.

    Args:
        problem: What is trained.
        model: What trains. By default one that runs eagerly on one device; its
            result is remembered.
    """
    if model is None:
        kept = _truth_of(problem.truth)
        return dataclasses.replace(kept, history=dict(kept.history))
    x, y, w = data(problem)
    options = _fit_options(problem)
    return testing.fit_large(
        problem, model, x, y, sample_weight=w, **options
    )


@functools.cache
def _truth_of(problem):
    with ORACLES.lent(problem) as model:
        result = fit_large(problem, model)
    # The model will train something else.
    return dataclasses.replace(result, model=None)


def fit_micro(problem, model=None, callbacks=None):
    """The same run in micro-batches, with kaccum.

    Args:
        problem: What is trained.
        model: What trains. By default one of its architecture that may have
            been compiled by another test, with its first weights.
        callbacks: Those of `fit`. By default what accumulates, alone.
    """
    if callbacks is None:
        callbacks = [problem.callback]
    if callbacks:
        counting.runs.add(problem)
    if model is None:
        with MODELS.lent(problem) as model:
            return fit_micro(problem, model, callbacks)
    options = _fit_options(problem)
    x, y, w = data(problem)
    if problem.unknown_length:
        history = model.fit(
            _dataset(problem, x, y, w, options),
            epochs=problem.epochs,
            verbose=0,
            callbacks=callbacks,
            **options,
        ).history
        return result_of(model, history)
    return testing.fit_micro(
        problem, model, x, y, sample_weight=w, callbacks=callbacks, **options
    )


def assert_same(problem, micro, large):
    """Law 1."""
    if BACKEND == "torch" and problem.token_weights:
        # Keras multiplies them by the mask in place (3.15), before metrics do.
        for each in (micro, large):
            each.history.pop("sparse_categorical_crossentropy")
    testing.assert_same(micro, large, tolerance(problem))


def check(problem):
    """Trains both ways and compares."""
    assert_same(problem, fit_micro(problem), fit_large(problem))


def _fit_options(problem):
    options = {}
    if problem.kind == "class_weight":
        options["class_weight"] = CLASS_WEIGHT
    if problem.validation:
        options["validation_data"] = data(problem)[:2]
        options["validation_batch_size"] = problem.examples
    return options


def _dataset(problem, x, y, w, options):
    if BACKEND != "tensorflow" and options.pop("class_weight", None):
        # Keras multiplies them by those of data that it knows.
        w = np.array([CLASS_WEIGHT[label] for label in y], "float32")
    arrays = (x, y) if w is None else (x, y, w)

    def batches():
        for start in range(0, len(x), problem.batch):
            yield tuple(a[start : start + problem.batch] for a in arrays)

    return of_unknown_length(batches)

"""The engine on TensorFlow: sums of gradients, and the steps that use them.

The only file that imports tensorflow. It is told which step to run, and leaves
the counting of micro-batches to others.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from kaccum import weights
from kaccum.keras_private import compiled_loss, variables_of
from kaccum.patches import Patch, patched

# How the end of the data reaches a train function.
END_OF_DATA = (StopIteration, tf.errors.OutOfRangeError)


class GradientAccumulator:
    """Sums of weighted gradients, and the update that uses them.

    Args:
        optimizer: The `keras.optimizers.Optimizer` that makes the updates.
        apply: Function of `(gradients, variables)` that makes an update.
            Defaults to the optimizer's own `apply`.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        *,
        apply: Callable[..., Any] | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._apply = apply or optimizer.apply
        self._variables: list[Any] = []
        self._dtypes: dict[int, Any] = {}
        self._sums: dict[int, tf.Variable] = {}
        self._in_window: set[int] = set()
        self._is_divided = True
        self._once: list[Callable[[], Any]] = []
        self._weight = _new_sum((), tf.float32, device="")

    @property
    def count(self) -> int:
        """The number of variables that ever had a gradient."""
        return len(self._sums)

    def add(
        self, gradients: Sequence[Any], variables: Sequence[Any], weight: Any
    ) -> None:
        """Adds the gradients of one micro-batch to the sums.

        Args:
            gradients: Tensors of the variables' shapes, `tf.IndexedSlices`, or
                `None` where a variable has no gradient.
            variables: The variables, in the same order.
            weight: Scalar, the denominator of the micro-batch's mean loss;
                `None` for a loss that is a sum.
        """
        self._variables = list(variables)
        self._is_divided = weight is not None
        weight = tf.cast(1.0 if weight is None else weight, tf.float32)
        self._weight.assign_add(weight)
        for gradient, variable in zip(gradients, self._variables):
            if gradient is None:
                continue
            key = id(variable)
            self._in_window.add(key)
            if key not in self._sums:
                self._dtypes[key] = gradient.dtype
                self._sums[key] = _new_sum(
                    variable.shape,
                    _sum_dtype(gradient.dtype),
                    device=getattr(variable, "value", variable).device,
                )
            if _is_overwritten(variable):
                self._sums[key].assign(
                    tf.maximum(self._sums[key], gradient)
                )
            else:
                _add_weighted(self._sums[key], gradient, weight)

    def apply(self) -> Any:
        """Makes one update of the window's gradient and empties the sums.

        The gradient is `sum(weight * gradient) / sum(weight)`.
        """
        result = self._apply(self._window_gradients(), self._variables)
        self.reset()
        return result

    def reset(self) -> None:
        """Empties the sums: the open window is forgotten."""
        for total in [self._weight, *self._sums.values()]:
            _assign(total, tf.zeros(total.shape, total.dtype))
        if tf.executing_eagerly():
            self._in_window.clear()

    def release(self) -> None:
        """Frees the memory of the sums. `reset` takes it again."""
        for total in self._sums.values():
            _assign(total, tf.zeros([0], total.dtype))
        self._in_window.clear()

    def count_once(self, terms: list[Callable[[], Any]]) -> None:
        """Says which terms of the loss do not depend on the data.

        Means count them once by themselves; sums would count them once a
        micro-batch.
        """
        self._once = terms

    def _window_gradients(self) -> list[Any]:
        gradients: list[Any] = [None] * len(self._variables)
        share = tf.math.divide_no_nan(1.0, self._weight)
        for i, variable in enumerate(self._variables):
            key = id(variable)
            # What is compiled serves every window; eager execution knows.
            touched = self._in_window if tf.executing_eagerly() else self._sums
            if key not in touched:
                continue
            gradient = tf.convert_to_tensor(self._sums[key])
            if self._is_divided and not _is_overwritten(variable):
                gradient *= tf.cast(share, gradient.dtype)
            gradients[i] = gradient
        if not self._is_divided and self._once:
            self._subtract_repetitions(gradients)
        return [
            g if g is None else tf.cast(g, self._dtypes[id(v)])
            for g, v in zip(gradients, self._variables)
        ]

    def _subtract_repetitions(self, gradients: list[Any]) -> None:
        """Takes out all but one of the terms that every micro-batch added."""
        with tf.GradientTape() as tape:
            loss = tf.add_n([tf.reduce_sum(term()) for term in self._once])
        watched = [getattr(v, "value", v) for v in self._variables]
        once = tape.gradient(loss, watched)
        for i, term in enumerate(once):
            if term is not None and gradients[i] is not None:
                repetitions = tf.cast(self._weight - 1.0, gradients[i].dtype)
                term = tf.cast(tf.convert_to_tensor(term), gradients[i].dtype)
                gradients[i] -= repetitions * term


def _new_sum(shape: Any, dtype: tf.DType, *, device: str) -> tf.Variable:
    """A variable of zeros, also while a function is traced.

    Which variables have gradients is first known inside the trace. There a new
    variable would belong to the function and have it traced a second time; a
    thread of its own is outside.
    """
    made = []

    def make() -> None:
        with tf.device(device):
            made.append(tf.Variable(tf.zeros(shape, dtype), trainable=False))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]


def _assign(total: tf.Variable, value: tf.Tensor) -> None:
    # `Variable.assign` insists on the shape. A variable's handle outlives its
    # value, so what was compiled with an emptied sum stays valid.
    tf.raw_ops.AssignVariableOp(resource=total.handle, value=value)


def _sum_dtype(dtype: Any) -> tf.DType:
    dtype = tf.as_dtype(dtype)
    return tf.float32 if dtype.size < 4 else dtype


def _is_overwritten(variable: Any) -> bool:
    # The "gradients" of float8 scales are their new values (Keras 3.15).
    return getattr(variable, "overwrite_with_gradient", False)


def _add_weighted(total: tf.Variable, gradient: Any, weight: Any) -> None:
    weight = tf.cast(weight, total.dtype)
    if isinstance(gradient, tf.IndexedSlices):
        values = weight * tf.cast(gradient.values, total.dtype)
        total.scatter_add(tf.IndexedSlices(values, gradient.indices))
    else:
        # total += weight * gradient in one pass over memory.
        tf.raw_ops.ResourceApplyGradientDescent(
            var=total.handle,
            alpha=-weight,
            delta=tf.cast(gradient, total.dtype),
        )


class _Step:
    """What one run (or trace) of a training step knows, on one replica."""

    def __init__(self, data: Any, closes: bool) -> None:
        self.data = data
        self.closes = closes
        self.denominators: list[weights.Denominator] = []
        self.calls = 0
        self.is_applying = False
        self.is_scaled = False


def use_full_precision() -> str:
    """Turns TensorFloat-32 off, for comparisons to rounding.

    Returns:
        The name of the device that TensorFlow computes on by default.
    """
    tf.config.experimental.enable_tensor_float_32_execution(False)
    gpus = tf.config.list_logical_devices("GPU")
    return gpus[0].name if gpus else "CPU (not run on a GPU)"


class Engine:
    """Two versions of a model's training step: *add* and *update*.

    Both are made by the model's own `make_train_function`, so they pull data,
    compile and distribute as the plain one does. While they run (or are
    traced), `optimizer.apply` adds to the sums; *update* then also makes the
    optimizer's real `apply`.

    Args:
        model: A compiled `keras.Model` whose `train_function` is made.
    """

    end_of_data = END_OF_DATA

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self._optimizer = model.optimizer
        # A `tf.function` would be traced once, for *add* and *update* alike.
        step = model.train_step
        self._train_step = getattr(step, "python_function", step)
        self._is_plain_step = type(model).train_step is keras.Model.train_step
        self._is_plain_loss = (
            type(model).compute_loss is keras.Model.compute_loss
        )
        self._real_apply = self._optimizer.apply
        self._real_apply_gradients = self._optimizer.apply_gradients
        self._real_scale_loss = self._optimizer.scale_loss
        self._running = threading.local()
        self._accumulators: list[GradientAccumulator] = []
        self._hooks = self._make_hooks()
        self._steps = {closes: self._make(closes) for closes in (False, True)}
        self._execute = tf.function(self._run_in_graph, autograph=False)
        self._applies: dict[int, Callable[[], Any]] = {}

    def start(self) -> None:
        """Makes ready for a fit: all sums are empty."""
        if self._model.built and self._is_plain_step:
            with self._model.distribute_strategy.scope():
                self._build_optimizer(self._model.trainable_variables)
        for accumulator in self._accumulators:
            accumulator.reset()

    def run(self, iterator: Any, closes: list[bool]) -> tuple[Any, int]:
        """Runs one training step for each entry of `closes`.

        Args:
            iterator: The batches: what `fit` gives a `train_function`.
            closes: For each micro-batch, whether it closes its window.

        Returns:
            The last step's logs, and how many steps were run before the data
            came to its end.

        Raises:
            StopIteration, tf.errors.OutOfRangeError: If there was no data.
        """
        if len(closes) == 1:
            return self._steps[closes[0]](iterator), 1
        is_dataset = isinstance(
            iterator, (tf.data.Iterator, tf.distribute.DistributedIterator)
        )
        if is_dataset and not self._model.run_eagerly:
            logs, ran = self._execute(iterator, tf.constant(closes))
            return logs, int(ran)
        ran = 0
        for is_last, data in zip(closes, iterator):
            logs = self._steps[is_last](iter([data]))
            ran += 1
        if ran == 0:
            raise StopIteration
        return logs, ran

    def update(self) -> None:
        """Makes an update of what was added, without another micro-batch."""
        if self._model.run_eagerly:
            self._apply_all()
            return
        # Compiled anew only when another variable got a gradient since.
        sums = sum(a.count for a in self._accumulators)
        if sums not in self._applies:
            self._applies[sums] = tf.function(
                self._apply_all,
                autograph=False,
                jit_compile=self._model.jit_compile,
            ).get_concrete_function()
        self._applies[sums]()

    def stop(self) -> None:
        """Frees the sums' memory."""
        for accumulator in self._accumulators:
            accumulator.release()

    def _make(self, closes: bool) -> Callable[[Any], Any]:
        model = self._model
        step = Patch(
            model, "train_step", functools.partial(self._step, closes=closes)
        )
        plain = model.train_function
        with patched([step]):
            model.make_train_function(force=True)
        function = model.train_function
        model.train_function = plain
        # Around the whole call, not inside the step: replicas are threads.
        patches = [step, *self._hooks]

        def run(iterator: Any) -> Any:
            with weights.hearing(), patched(patches):
                return function(iterator)

        return run

    def _make_hooks(self) -> list[Patch]:
        others = [
            value
            for value in vars(self._model).values()
            if isinstance(value, keras.optimizers.Optimizer)
            and value is not self._optimizer
        ]
        hooks = [
            Patch(self._optimizer, "apply", self._on_apply),
            Patch(self._optimizer, "apply_gradients", self._on_apply_gradients),
            Patch(self._optimizer, "scale_loss", self._on_scale_loss),
        ]
        hooks += [
            Patch(o, "apply", functools.partial(self._on_other, o.apply))
            for o in others
        ]
        loss = compiled_loss(self._model)
        if loss is not None:
            hooks.append(
                Patch(loss, "call", functools.partial(self._on_loss, loss.call))
            )
        return hooks

    def _step(self, data: Any, closes: bool) -> Any:
        step = self._running.step = _Step(data, closes)
        try:
            logs = self._train_step(data)
        finally:
            self._running.step = None
        if step.calls == 0 and self._model.trainable_variables:
            raise RuntimeError(
                "The model's `train_step` must update its weights by "
                "`self.optimizer.apply_gradients` or `self.optimizer.apply`: "
                "there is nothing to accumulate. Received: a `train_step` of "
                f"{type(self._model).__name__} that called neither (inside a "
                "`tf.function` of its own they are not seen)."
            )
        return logs

    def _on_loss(
        self, real: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        step = getattr(self._running, "step", None)
        if step is None:
            return real(*args, **kwargs)
        with weights.listen_to(step.denominators):
            return real(*args, **kwargs)

    def _on_other(
        self, real: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        step = getattr(self._running, "step", None)
        if step is None or step.is_applying:
            return real(*args, **kwargs)
        raise RuntimeError(
            "The model's `train_step` must apply gradients by "
            "`self.optimizer` only, whose gradients are accumulated. Received: "
            f"a `train_step` of {type(self._model).__name__} that applied some "
            "by another optimizer."
        )

    def _on_scale_loss(self, loss: Any) -> Any:
        step = getattr(self._running, "step", None)
        if step is not None:
            step.is_scaled = True
            if isinstance(self._optimizer, keras.optimizers.LossScaleOptimizer):
                # Until it is built it scales by a constant, which would be
                # compiled into the step (Keras 3.15).
                self._build_optimizer(self._model.trainable_variables)
        return self._real_scale_loss(loss)

    def _on_apply(self, grads: Any, trainable_variables: Any = None) -> Any:
        return self._accumulate(
            self._real_apply, list(grads), trainable_variables
        )

    def _on_apply_gradients(self, grads_and_vars: Any, **kwargs: Any) -> Any:
        def apply(gradients: Any, variables: Any) -> Any:
            pairs = list(zip(gradients, variables))
            return self._real_apply_gradients(pairs, **kwargs)

        gradients, variables = zip(*grads_and_vars)
        self._accumulate(apply, gradients, variables)
        return self._optimizer.iterations

    def _accumulate(
        self, apply: Callable[..., Any], gradients: Any, variables: Any
    ) -> Any:
        step = getattr(self._running, "step", None)
        if step is None or step.is_applying:
            return apply(gradients, variables)
        if variables is None:
            variables = variables_of(self._optimizer)
        self._build_optimizer(variables)
        # A step may apply gradients more than once, say for two groups of
        # variables: the calls are told apart by their order.
        if step.calls == len(self._accumulators):
            self._accumulators.append(
                GradientAccumulator(self._optimizer, apply=apply)
            )
        accumulator = self._accumulators[step.calls]
        step.calls += 1
        # With a data set of unknown length, the call that finds it exhausted
        # still runs all that does not depend on the batch (TensorFlow 2.21):
        # it would count an update.
        with tf.control_dependencies(_tensors(step.data)):
            accumulator.add(gradients, variables, self._weight(step))
            accumulator.count_once(self._regularizers(step))
            if step.closes:
                step.is_applying = True
                try:
                    accumulator.apply()
                finally:
                    step.is_applying = False
        return None

    def _weight(self, step: _Step) -> Any:
        heard = [d for d in step.denominators if _is_reachable(d.value)]
        return weights.weight_of(
            heard,
            functools.partial(weights.examples_in, step.data),
            is_plain=self._is_plain_step and self._is_plain_loss,
        )

    def _regularizers(self, step: _Step) -> list[Callable[[], Any]]:
        scale = self._real_scale_loss if step.is_scaled else lambda loss: loss

        def term(variable: Any) -> Any:
            return scale(variable.regularizer(variable))

        return [
            functools.partial(term, v)
            for v in self._model.trainable_variables
            if v.regularizer is not None
        ]

    def _build_optimizer(self, variables: Any) -> None:
        if not self._optimizer.built:
            with tf.init_scope(), keras.name_scope(self._optimizer.name):
                self._optimizer.build(list(variables))
            self._optimizer.built = True

    def _apply_all(self) -> None:
        strategy = self._model.distribute_strategy
        for accumulator in self._accumulators:
            strategy.run(accumulator.apply)

    def _run_in_graph(self, iterator: Any, closes: Any) -> tuple[Any, Any]:
        """`run` as one graph, for `steps_per_execution` above one."""
        count = tf.size(closes)

        def step(data: Any, i: Any) -> Any:
            # Outside the compiled step, which has no conditional.
            return tf.cond(
                closes[i],
                lambda: self._steps[True](iter([data])),
                lambda: self._steps[False](iter([data])),
            )

        def following(i: Any, current: Any) -> Any:
            return tf.cond(
                i < count, iterator.get_next_as_optional, lambda: current
            )

        def condition(i: Any, logs: Any, batch: Any) -> Any:
            return tf.logical_and(i < count, batch.has_value())

        def body(i: Any, logs: Any, batch: Any) -> Any:
            logs = step(batch.get_value(), i)
            return i + 1, logs, following(i + 1, batch)

        logs = step(iterator.get_next(), 0)
        batch = iterator.get_next_as_optional()
        ran, logs, _ = tf.while_loop(
            condition, body, (tf.constant(1), logs, batch)
        )
        return logs, ran


def _tensors(data: Any) -> list[tf.Tensor]:
    flat = tf.nest.flatten(data, expand_composites=True)
    return [leaf for leaf in flat if tf.is_tensor(leaf)]


def _is_reachable(tensor: Any) -> bool:
    """Whether the graph that is being traced may use `tensor`.

    A loss inside a `tf.function` of the user's own is in another graph.
    """
    if tensor is None or not hasattr(tensor, "graph"):
        return True
    graph = tf.compat.v1.get_default_graph()
    while graph is not None and graph is not tensor.graph:
        graph = getattr(graph, "outer_graph", None)
    return graph is not None

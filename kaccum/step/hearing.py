"""What the functions do that stand in for Keras's while a step runs.

`hooks` lists them. Each is called with the recording, what stood there, and the
arguments of the call; it appends to a list of the recording, and returns what
the step is to see.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from kaccum import callers
from kaccum.step import weights
from kaccum.step.recording import Applied, Recording, thread
from kaccum.sums.gradients import build_optimizer, variables_of
from kaccum.sums.log_means import LogNumber
from kaccum.sums.moments import LayerMoments

Call = Callable[..., Any]

#: The module of a class that adds up metrics over processes.
TRAINER_OF_PROCESSES = "keras.src.backend.torch.trainer"


def telling(heard: Call, also_inside: bool, original: Call) -> Call:
    """What stands in for a function of Keras, as of a row of `hooks.HOOKS`."""

    def tell(*args: Any, **kwargs: Any) -> Any:
        recording = thread.recording
        if recording is None or not recording.hears(heard):
            return original(*args, **kwargs)
        if not (also_inside or is_here(recording)):
            return original(*args, **kwargs)
        return heard(recording, original, *args, **kwargs)

    return tell


def is_here(recording: Recording) -> bool:
    """Whether what is called now is traced with the step, or runs with it."""
    return bool(recording.backend.trace() == recording.trace)


def on_apply(
    recording: Recording,
    original: Call,
    grads: Any,
    trainable_variables: Any = None,
) -> None:
    """The gradients of a step."""
    _hear_gradients(recording, original, list(grads), trainable_variables)


def on_apply_gradients(
    recording: Recording, original: Call, grads_and_vars: Any, **options: Any
) -> Any:
    """The same, by the older name."""

    def apply(gradients: Any, variables: Any) -> Any:
        return original(list(zip(gradients, variables)), **options)

    gradients, variables = zip(*grads_and_vars)
    _hear_gradients(recording, apply, gradients, variables)
    return recording.step.optimizer.iterations


def on_stateless_apply(
    recording: Recording,
    original: Call,
    optimizer_variables: Any,
    grads: Any,
    trainable_variables: Any,
) -> Any:
    """The same in steps of JAX: `LossScaleOptimizer` has one of its own."""
    optimizer = recording.step.optimizer
    apply = functools.partial(stateless_apply, optimizer, original)
    _hear_gradients(recording, apply, list(grads), None)
    return trainable_variables, optimizer_variables


def stateless_apply(
    optimizer: Any, original: Call, gradients: Any, variables: Any
) -> None:
    """An update by the `stateless_apply` of an optimizer, `original`."""
    groups = (variables_of(optimizer), optimizer.variables)
    trainable, others = ([v.value for v in group] for group in groups)
    new = original(others, gradients, trainable)
    for group, values in zip(groups, new):
        for variable, value in zip(group, values):
            variable.assign(value)


def _hear_gradients(
    recording: Recording, apply: Call, gradients: Any, variables: Any
) -> None:
    if not gradients:
        # All weights are frozen: to Keras's optimizers that is nothing.
        return
    if not is_here(recording):
        raise RuntimeError(
            "The model's `train_step` must apply gradients outside of a "
            "`tf.function` or `jax.jit` of its own: they are accumulated "
            "there, and what was traced would stay. Received: a "
            f"`train_step` of {type(recording.step.model).__name__} that did "
            "not."
        )
    if variables is None:
        variables = variables_of(recording.step.optimizer)
    if not recording.step.is_keras_step:
        gradients = recording.backend.snapshot(gradients)
    so_far = slice(len(recording.reductions))
    recording.applied.append(
        Applied(
            apply,
            gradients,
            list(variables),
            so_far,
            recording.undivided_gradients,
        )
    )


def on_other_update(
    recording: Recording, original: Call, *args: Any, **options: Any
) -> None:
    """An update by another optimizer."""
    raise RuntimeError(
        "The model's `train_step` must apply gradients by "
        "`self.optimizer` only, whose gradients are accumulated. Received: "
        f"a `train_step` of {type(recording.step.model).__name__} that applied "
        "some by another optimizer. With several of them, keep a "
        "`kaccum.GradientAccumulator(optimizer)` for each: in the step call "
        "`add(gradients, variables, weight=len(x))`, and after the last "
        "micro-batch of a window `apply()`."
    )


def on_scale_loss(recording: Recording, original: Call, loss: Any) -> Any:
    """The loss of a step."""
    step, optimizer = recording.step, recording.step.optimizer
    recording.scale = original
    so_far = slice(len(recording.reductions))
    if step.weighs_losses and not step.is_mixed and is_here(recording):
        recording.weighs_loss = True
        step.lend_sums()
        weight = recording.weight(so_far)
        if weight is None:
            return original(loss)
        share = step.sums.share_of(weight)
        # Of what an optimizer makes of it: a penalty of its own is weighed.
        loss = original(loss)
        if isinstance(share, float):
            return loss if share == 1.0 else loss * share
        return loss * ops.stop_gradient(ops.cast(share, loss.dtype))
    if step.is_scaling and recording.weight(so_far) is not None:
        # A part of a batch that is scaled as the whole would overflow earlier.
        step.scales = True

        def scale(loss: Any) -> Any:
            parts = ops.cast(step.sums.parts_of_loss, loss.dtype)
            return original(loss / parts)

        recording.scale = scale
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        # Until it is built it scales by a constant, which would be
        # compiled into the step (Keras 3.15).
        build_optimizer(optimizer, recording.step.model.trainable_variables)
    if recording.second_gradients is not None and recording.undivided:
        # On JAX this is in what it takes the gradient of, which goes on there.
        recording.undivided_gradients = recording.second_gradients(
            recording.scale(recording.undivided_loss),
            recording.step.model.trainable_weights,
        )
    return recording.scale(loss)


def on_compiled_loss(
    recording: Recording, original: Call, *args: Any, **options: Any
) -> Any:
    """The losses that `compile` was given."""
    if not is_here(recording):
        loss = original(*args, **options)
        recording.step.check_means()
        return loss
    heard = len(recording.reductions)
    recording.is_in_loss, recording.depth = True, 0
    try:
        loss = original(*args, **options)
    finally:
        recording.is_in_loss = False
    if len(recording.reductions) == heard:
        recording.step.check_heard()
    return loss


def on_loss(
    recording: Recording, original: Call, *args: Any, **options: Any
) -> Any:
    """One of them, or one that it calls."""
    recording.depth += 1
    if recording.depth == 1:
        recording.loss = args[0]
    try:
        return original(*args, **options)
    finally:
        recording.depth -= 1


def on_reduction(
    recording: Recording,
    original: Call,
    values: Any,
    sample_weight: Any = None,
    mask: Any = None,
    reduction: str | None = "sum_over_batch_size",
    dtype: Any = None,
) -> Any:
    """How it becomes a number."""
    if not is_here(recording):
        of_weights = reduction == "mean_with_sample_weight"
        if mask is not None or (of_weights and sample_weight is not None):
            if recording.step.options.weight is None:
                recording.step.differences.tell_of_unheard()
        return original(values, sample_weight, mask, reduction, dtype)
    if not recording.is_in_loss or recording.depth != 1:
        return original(values, sample_weight, mask, reduction, dtype)
    is_sum = recording.step.kinds.of(recording.loss) == "sum"
    if is_sum and not recording.step.is_keras_step:
        if tuple(values.shape) == () and recording.step.options.weight is None:
            recording.step.kinds.tell_of_sum(recording.loss)
        is_sum = False
    # Before Keras changes weights and masks in place (PyTorch, 3.15).
    recording.reductions.append(
        weights.reduction_of(
            values, sample_weight, mask, reduction, is_sum=is_sum
        )
    )
    if recording.reductions[-1].kind == "hidden":
        recording.step.kinds.tell_of_hidden(recording.loss)
    value = original(values, sample_weight, mask, reduction, dtype)
    recording.reduced(value)
    return value


def on_added_loss(recording: Recording, original: Call, loss: Any) -> Any:
    """What a layer added, or a regularizer: Keras sums its elements."""
    call = recording.calls["added"]
    recording.calls["added"] += 1
    step = recording.step
    kind = step.kinds.of_added(call)
    is_sum = len(loss.shape) > 0 or kind == "sum"
    if step.adds_losses_up:
        if is_sum:
            recording.reductions.append(weights.Reduction("sum"))
            recording.undivided.append(ops.sum(loss))
        elif kind == "mean":
            recording.reductions.append(weights.Reduction("hidden"))
    elif is_sum and not step.is_keras_step:
        # (An own `compute_loss` is measured as a whole.)
        if all(each.kind == "sum" for each in recording.reductions):
            recording.reductions.append(weights.Reduction("sum"))
        elif step.options.weight is None:
            # It cannot be kept apart from what such a step makes of losses.
            step.differences.tell_of_added_sum()
    return original(loss)


def on_scaling_for_replicas(
    recording: Recording, original: Call, value: Any
) -> Any:
    """What Keras would divide, or multiply, by the number of replicas."""
    return value


def on_mean(
    recording: Recording,
    original: Call,
    metric: Any,
    values: Any,
    sample_weight: Any = None,
) -> Any:
    """What a `Mean` is given."""
    size = sample_weight
    if any(len(getattr(v, "shape", ())) for v in (values, size)):
        return original(metric, values, size)
    call = recording.calls[id(metric)]
    recording.calls[id(metric)] += 1
    of: slice | None = slice(len(recording.reductions))
    has_regularizers = False
    if recording.is_in_loss:
        # The loss of one of several outputs. Keras weights it by the number
        # of examples only where that is not traced (Keras 3.15).
        of = slice(len(recording.reductions) - 1, len(recording.reductions))
        size = size if recording.backend.knows_shapes() else None
    elif isinstance(metric, keras.metrics.MeanMetricWrapper):
        # What a metric function returned, a scalar of its own making.
        of = None
    else:
        has_regularizers = True
    weight = recording.weight(of)
    is_number = isinstance(size, (int, float))
    has_undivided = has_regularizers and recording.step.is_mixed
    if isinstance(weight, float) and is_number and size == weight:
        if not has_undivided:
            # Keras's own mean over batches is that over all their examples.
            return original(metric, values, size)
    values = ops.stop_gradient(ops.convert_to_tensor(values))
    undivided = 0.0
    if has_undivided:
        undivided = ops.stop_gradient(recording.undivided_loss)
    recording.log_numbers.append(
        LogNumber(metric, call, values, size, of, has_regularizers, undivided)
    )
    if not recording.is_in_gradient:
        recording.add_log_numbers()
    return None


def on_moments(
    recording: Recording, original: Call, layer: Any, inputs: Any, mask: Any
) -> Any:
    """What a `BatchNormalization` normalises with."""
    mean, variance = original(layer, inputs, mask)
    if callers.is_keras_normalization():
        call = recording.calls[id(layer)]
        recording.calls[id(layer)] += 1
        recording.moments.append(
            LayerMoments(
                layer,
                call,
                ops.stop_gradient(mean),
                ops.stop_gradient(variance),
                _elements(layer, inputs, mask),
            )
        )
        recording.still |= {id(layer.moving_mean), id(layer.moving_variance)}
    return mean, variance


def on_assign(
    recording: Recording, original: Call, variable: Any, value: Any
) -> Any:
    """What a step assigns, unless an update does that."""
    if recording.drops(variable):
        return value
    if id(variable) in recording.still:
        recording.still.remove(id(variable))
        return value
    if id(variable) not in recording.step.assigned:
        recording.note_assigned(variable)
    is_new = id(variable) not in recording.before
    if recording.may_be_left_out and is_new and is_here(recording):
        before = recording.backend.before(variable)
        if before is not None:
            recording.before[id(variable)] = (variable, before)
    return original(variable, value)


def on_grad(
    recording: Recording,
    original: Call,
    fun: Call,
    argnums: Any = 0,
    has_aux: bool = False,
    *,
    returns_value: bool = False,
    **options: Any,
) -> Call:
    """A function whose gradient JAX takes: what it tells leaves it."""

    @functools.wraps(fun)
    def call(*args: Any, **kwargs: Any) -> Any:
        # A step may keep this function for the next micro-batch.
        now = thread.recording
        if now is None or not is_here(now):
            derived = original(fun, argnums, has_aux, **options)
            return derived(*args, **kwargs)
        derived = now.backend.differentiated(
            fun,
            [now.reductions, now.log_numbers, now.moments, now.undivided],
            now.traced_further,
            now.second_gradients,
            argnums=argnums,
            has_aux=has_aux,
            returns_value=returns_value,
            **options,
        )
        return derived(*args, **kwargs)

    return call


def on_value_and_grad(
    recording: Recording, original: Call, *args: Any, **options: Any
) -> Call:
    """The same, where the value is wanted, too."""
    return on_grad(recording, original, *args, returns_value=True, **options)


def on_metrics(
    recording: Recording, show: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The model's metrics, which a step asks for."""
    metrics = show()
    recording.show = show
    recording.shown.append(dict(metrics))
    return metrics


def on_metrics_of_processes(
    recording: Recording, original: Call, model: Any
) -> dict[str, Any]:
    """The metrics of a model, which Keras adds up over processes."""
    mro = type(model).__mro__
    trainer: type = next(k for k in mro if k.__module__ == TRAINER_OF_PROCESSES)
    above: Any = super(trainer, model)
    found: dict[str, Any] = above.get_metrics_result()
    return found


def on_layer(
    outputs: Any, original: Call, layer: Any, *args: Any, **kwargs: Any
) -> Any:
    """A layer that a test step calls."""
    outputs.arguments.append((args, kwargs))
    return outputs.call(layer, lambda: original(layer, *args, **kwargs))


def on_stateless_layer(
    outputs: Any,
    original: Call,
    layer: Any,
    trainable: Any,
    others: Any,
    *args: Any,
    return_losses: bool = False,
    **kwargs: Any,
) -> Any:
    """The same, on JAX: Keras calls the model so."""

    def run() -> Any:
        return original(
            layer, trainable, others, *args, return_losses=True, **kwargs
        )

    outputs.arguments.append((args, kwargs))
    result = outputs.call_stateless(layer, run, (trainable, others))
    return result if return_losses else result[:2]


#: Of the handlers above, those that tell what a layer returns.
OF_CALLS = (on_layer, on_stateless_layer, on_metrics_of_processes)
#: And those that tell what a loss is.
OF_LOSSES = (on_compiled_loss, on_loss, on_reduction, on_scaling_for_replicas)


def _elements(layer: Any, inputs: Any, mask: Any) -> Any:
    """How many elements the mean of a feature is of, a scalar."""
    shape = ops.shape(inputs)
    axis = layer.axis % len(shape)
    # A number, where the shape is known.
    size = math.prod(each for i, each in enumerate(shape) if i != axis)
    size = ops.cast(size, "float32")
    if mask is None:
        return size
    return size * ops.mean(ops.cast(mask, "float32"))

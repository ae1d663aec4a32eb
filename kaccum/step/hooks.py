"""Everything of Keras and JAX that is replaced: why, and for how long.

`HOOKS` is the table. Nothing is replaced that has no row of it.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import keras
from keras.src.losses import losses as losses_module

from kaccum.backends import backend
from kaccum.checks import with_inner
from kaccum.patches import Patch, patched
from kaccum.step import hearing
from kaccum.step.weights import loss_module

FIT = "during a fit with the callback, or in `accumulate`"
CUTTING = "during a fit with `micro_batch_size`"
MAKING = "while Keras makes a train or test function"
STEP = "while a training step runs, or is traced"
TEST = "while a test step runs, or is traced, whose batches are cut"
EITHER = "while a training step, or such a test step, runs or is traced"
UPDATE = "while several replicas make an update"
ORACLE = "during a fit of `kaccum.testing.fit_large`"


class Hook(NamedTuple):
    """A row of the table.

    Args:
        owner: Whose attribute is replaced, in words.
        attribute: Its name.
        lasts: For how long.
        since: The oldest Keras that has it (kaccum needs a newer one).
        why: What for.
        owners: For a step, function of the `TrainingStep` that returns them,
            or of `None` for a test step.
        heard: For a step, what is called instead: a function of the
            recording, of what stood there, and of the call's arguments.
        also_inside: Whether it also hears what a user's own step traces by
            itself (`tf.function`, `jax.jit`), of which nothing can be kept.
    """

    owner: str
    attribute: str
    lasts: str
    since: str
    why: str
    owners: Callable[[Any], Sequence[Any]] = lambda step: []
    heard: Callable[..., Any] = lambda _, original, *args: original(*args)
    also_inside: bool = False


def _optimizer(step: Any) -> Sequence[Any]:
    return [step.optimizer]


def _model(step: Any) -> Sequence[Any]:
    return [step.model]


def _compiled_loss(step: Any) -> Sequence[Any]:
    # `model.loss` is what the user passed; the object that calls it has no
    # public name (Keras 3.0 to 3.15).
    loss = step.model._compile_loss
    return [] if loss is None else [loss]


def _differentiating(step: Any) -> Sequence[Any]:
    return backend().differentiating()


def _trainer_of_processes(step: Any) -> Sequence[Any]:
    return [
        owner
        for owner in keras.Model.__mro__
        if owner.__module__ == hearing.TRAINER_OF_PROCESSES
        and "get_metrics_result" in vars(owner)
    ]


def _always(owner: Any) -> Callable[[Any], Sequence[Any]]:
    return lambda step: [owner]


# The class that makes every optimizer's updates.
_any_optimizer = _always(
    next(k for k in keras.optimizers.Optimizer.__mro__ if "apply" in vars(k))
)
_losses = _always(loss_module)


def _calling_themselves(step: Any) -> Sequence[Any]:
    return [
        kind
        for kind in vars(keras.losses).values()
        if isinstance(kind, type)
        and kind is not keras.losses.Loss
        and "__call__" in vars(kind)
    ]


def _reducing_themselves(step: Any) -> Sequence[Any]:
    has_it = hasattr(losses_module, "reduce_weighted_values")
    return [losses_module] if has_it else []


_UPDATES = "an optimizer that makes an update"

# fmt: off
HOOKS = (
    Hook("the model", "train_function", FIT, "3.0",
         "`fit` runs one step after the other by it."),
    Hook("the model", "make_train_function", FIT, "3.0",
         "The next `fit` calls it first: one that was interrupted ends there."),
    Hook("the model", "get_metrics_result", FIT, "3.0",
         "`fit` calls it between an epoch's last batch and validation: a short "
         "window is applied. In a step it tells which logs are the metrics'."),
    Hook("the model", "test_function", CUTTING, "3.0",
         "`fit` validates by it: batches are cut."),
    Hook("the model", "train_step", MAKING, "3.0",
         "Keras compiles and distributes what stands there (TensorFlow)."),
    Hook("the model", "test_step", MAKING, "3.0",
         "The same."),
    Hook("the model's optimizer", "apply", STEP, "3.0",
         "The gradients go into the sums.",
         _optimizer, hearing.on_apply, also_inside=True),
    Hook("the model's optimizer", "apply_gradients", STEP, "3.0",
         "The same, where a step calls this.",
         _optimizer, hearing.on_apply_gradients, also_inside=True),
    Hook("the model's optimizer", "stateless_apply", STEP, "3.0",
         "The same, in steps of JAX.",
         _optimizer, hearing.on_stateless_apply, also_inside=True),
    Hook("the model's optimizer", "scale_loss", STEP, "3.0",
         "The loss is multiplied by the weight of its micro-batch; terms that "
         "have no data are scaled as the loss is.",
         _optimizer, hearing.on_scale_loss, also_inside=True),
    Hook("keras.src.optimizers.base_optimizer.BaseOptimizer", "apply", STEP,
         "3.0",
         "Updates by another optimizer are refused.",
         _any_optimizer, hearing.on_other_update, also_inside=True),
    Hook("the compiled loss", "call", STEP, "3.0",
         "Of what is reduced, only the losses of `compile` count.",
         _compiled_loss, hearing.on_compiled_loss, also_inside=True),
    Hook("keras.losses.Loss", "__call__", STEP, "3.0",
         "A loss may call others: what those divide by is their business.",
         _always(keras.losses.Loss), hearing.on_loss),
    Hook("a loss of Keras with a call of its own", "__call__", STEP, "3.16",
         "The same.",
         _calling_themselves, hearing.on_loss),
    Hook("the model", "_aggregate_additional_loss", STEP, "3.2",
         "What a layer adds for each example is summed, so it is no mean.",
         _model, hearing.on_added_loss),
    Hook("keras.src.losses.loss", "reduce_weighted_values", STEP, "3.0",
         "The denominator of a loss is the weight of its micro-batch.",
         _losses, hearing.on_reduction, also_inside=True),
    Hook("keras.src.losses.losses", "reduce_weighted_values", STEP, "3.16",
         "The same, of a loss with a call of its own.",
         _reducing_themselves, hearing.on_reduction, also_inside=True),
    Hook("keras.src.losses.loss", "scale_loss_for_distribution", STEP, "3.8",
         "A replica's loss is that of its own micro-batch, not divided by "
         "their number.",
         _losses, hearing.on_scaling_for_replicas, also_inside=True),
    Hook("keras.src.losses.loss", "unscale_loss_for_distribution", STEP, "3.8",
         "The same, the other way round.",
         _losses, hearing.on_scaling_for_replicas, also_inside=True),
    Hook("keras.metrics.Mean", "update_state", STEP, "3.0",
         "One number a batch becomes one number a window.",
         _always(keras.metrics.Mean), hearing.on_mean),
    Hook("keras.layers.BatchNormalization", "_moments", STEP, "3.0",
         "Moving statistics advance once an update.",
         _always(keras.layers.BatchNormalization), hearing.on_moments),
    Hook("keras.Variable", "assign", EITHER, "3.0",
         "What a step assigns can be taken back; a test step that runs for its "
         "layers' outputs moves no metric.",
         _always(keras.Variable), hearing.on_assign, also_inside=True),
    Hook("jax", "value_and_grad", STEP, "3.0",
         "What is heard while a gradient is taken leaves it, as auxiliary "
         "output.",
         _differentiating, hearing.on_value_and_grad),
    Hook("jax", "grad", STEP, "3.0",
         "The same, where a step calls this.",
         _differentiating, hearing.on_grad),
    Hook("the model", "ddp_model", EITHER, "3.16",
         "Processes communicate once an update (PyTorch)."),
    Hook("keras.src.backend.torch.trainer.Trainer", "get_metrics_result",
         EITHER, "3.16",
         "The same: a step shows the metrics of its own process.",
         _trainer_of_processes, hearing.on_metrics_of_processes),
    Hook("keras.layers.Layer", "__call__", TEST, "3.0",
         "Layers that the step calls return what they did for its parts.",
         _always(keras.layers.Layer), hearing.on_layer),
    Hook("keras.layers.Layer", "stateless_call", TEST, "3.0",
         "The same: Keras calls a model so, on JAX.",
         _always(keras.layers.Layer), hearing.on_stateless_layer),
    Hook(_UPDATES, "_all_reduce_sum_gradients", UPDATE, "3.2",
         "Each replica has the whole gradient, which would be summed again."),
    Hook(_UPDATES, "_overwrite_model_variables_with_average_value", UPDATE,
         "3.0",
         "Keras has replicas wait for each other in a conditional, which "
         "TensorFlow 2.21 refuses."),
    Hook("the oracle's optimizer", "apply", ORACLE, "3.0",
         "Keras squares repeated rows of a sparse gradient wrongly (3.15): the "
         "oracle's gradients are dense."),
)
# fmt: on


def replacing(
    owner: str, attribute: str, instance: Any, stand_in: Callable[[Any], Any]
) -> Patch:
    """A patch of what the table lists.

    Args:
        owner: As of `Hook`.
        attribute: As of `Hook`.
        instance: The owner.
        stand_in: As of `Patch`.

    Raises:
        LookupError: If there is no such row.
    """
    if not any((owner, attribute) == hook[:2] for hook in HOOKS):
        raise LookupError(f"HOOKS has no row of {owner}, {attribute}.")
    return Patch(instance, attribute, stand_in)


def replacing_step(
    model: keras.Model, attribute: str, step: Callable[..., Any]
) -> AbstractContextManager[None]:
    """A context in which a model has a `train_step` or `test_step` instead."""
    return patched(
        [replacing("the model", attribute, model, lambda original: step)]
    )


def alone(model: keras.Model) -> list[Patch]:
    """Patches that have a model run without other processes."""
    if vars(model).get("ddp_model") is None:
        return []
    return [replacing("the model", "ddp_model", model, lambda wrapped: None)]


def overhearing(step: Any) -> list[Patch]:
    """Patches that have all that a `TrainingStep` does be heard.

    They are to be in place around a whole call, not inside of the step, for
    replicas are threads; they do something only inside of a thread's
    `Recording.running()`.
    """
    return [*_patches((STEP, EITHER), step), *alone(step.model)]


def of_test_steps(model: keras.Model) -> list[Patch]:
    """The same for a `TestStep`."""
    return [*_patches((TEST, EITHER), None), *alone(model)]


def _patches(lasts: Sequence[str], step: Any) -> list[Patch]:
    patches = []
    for hook in HOOKS:
        if hook.lasts not in lasts:
            continue
        for owner in hook.owners(step):
            is_shared = isinstance(owner, (type, types.ModuleType))
            make = _shared_patch_of if is_shared else _patch_of
            patches.append(make(hook, owner))
    return patches


def whole_gradients(optimizer: keras.optimizers.Optimizer) -> list[Patch]:
    """For updates of optimizers that get the gradients of all replicas."""
    patches = []
    for each in with_inner(optimizer):
        for name, method in backend().of_whole_gradients(each).items():
            stand_in = functools.partial(_instead, method)
            patches.append(replacing(_UPDATES, name, each, stand_in))
    return patches


def _instead(method: Any, original: Any) -> Any:
    return method


def _patch_of(hook: Hook, owner: Any) -> Patch:
    tell = functools.partial(hearing.telling, hook.heard, hook.also_inside)
    return Patch(owner, hook.attribute, tell)


_lock = threading.Lock()
_shared: dict[tuple[int, str], Patch] = {}


def _shared_patch_of(hook: Hook, owner: Any) -> Patch:
    """One for all models, and all threads."""
    key = (id(owner), hook.attribute)
    with _lock:
        if key not in _shared:
            _shared[key] = _patch_of(hook, owner)
        return _shared[key]

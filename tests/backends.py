"""What differs between the backends of Keras.

What cannot apply on all of them is marked, with the reason.
"""

import importlib
import importlib.util
import itertools

import keras
import numpy as np
import pytest

# `fit` takes an adapter of one's own (Keras 3.0); its class is not public.
from keras.src.trainers.data_adapters.generator_data_adapter import (
    GeneratorDataAdapter,
)

BACKEND = keras.backend.backend()
#: Whether Keras runs several steps in one execution on each backend, and wraps
#: a model of several processes of PyTorch.
IS_NEW = tuple(map(int, keras.__version__.split(".")[:2])) >= (3, 16)


class _TensorFlow:
    """TensorFlow, imported by the first test that uses it.

    On the other backends none may: it need not be installed there.
    """

    def __getattr__(self, name):
        if BACKEND != "tensorflow":
            raise RuntimeError(f"A test on {BACKEND} asks for TensorFlow.")
        return getattr(importlib.import_module("tensorflow"), name)


tf = _TensorFlow()


def graph(function):
    """A function compiled by its author, where there is `tf.function`."""
    return tf.function(function) if BACKEND == "tensorflow" else function


def only_on(*backends, reason):
    """Marks a test of what the other backends do not have."""
    return pytest.mark.skipif(
        BACKEND not in backends, reason=f"{BACKEND}: {reason}"
    )


def needs(*packages):
    """Marks a test of what these packages are for."""
    found = all(map(importlib.util.find_spec, packages))
    return pytest.mark.skipif(not found, reason=f"needs {packages}")


needs_strategies = only_on("tensorflow", reason="no tf.distribute")
needs_graphs = only_on("tensorflow", reason="no graphs or tf.function")
needs_sparse = only_on("tensorflow", reason="no sparse gradients or inputs")
# Keras's `TensorBoard` writes by TensorFlow, on each backend (3.15).
needs_tensorboard = needs("tensorboard", "tensorflow")
needs_demo = needs("sklearn", "matplotlib")
needs_compiling = only_on("tensorflow", "jax", reason="nothing is compiled")

#: How a model can be compiled, for `tests.reference.Problem`.
EXECUTIONS = {
    "tensorflow": ["graph", "xla", "eager"],
    "jax": ["xla", "eager"],
    "torch": ["eager"],
}[BACKEND]

COMPILED = EXECUTIONS[:-1]


def compile_options(execution="graph", steps_per_execution=1):
    """Those of `compile`, as far as the backend has them."""
    is_xla = execution == "xla"
    return {
        "tensorflow": {
            "run_eagerly": execution == "eager",
            "jit_compile": is_xla,
            "steps_per_execution": steps_per_execution,
        },
        # Compiled by XLA, or not at all.
        "jax": {
            "run_eagerly": execution == "eager",
            "jit_compile": execution != "eager",
            "steps_per_execution": steps_per_execution,
        },
        "torch": {
            "jit_compile": False,
            **({"steps_per_execution": steps_per_execution} if IS_NEW else {}),
        },
    }[BACKEND]


def eagerly(model):
    """The model, to be trained once or twice: compiling it takes longer."""
    model.run_eagerly = True
    return model


def of_unknown_length(batches):
    """Data for `fit` that does not tell how many batches it has.

    Args:
        batches: Function that returns an iterator over tuples of arrays, a new
            one for each epoch. All but the first axis are as in the first.
    """
    if BACKEND != "tensorflow":
        return _Batches(batches)
    first = next(iter(batches()))
    specs = [
        tf.TensorSpec((None, *a.shape[1:])[: a.ndim], a.dtype) for a in first
    ]
    return tf.data.Dataset.from_generator(
        batches, output_signature=tuple(specs)
    )


class _Batches(GeneratorDataAdapter):
    """As Keras has it for a generator, but anew for each epoch."""

    def __init__(self, batches):
        super().__init__(batches())
        self.generator = batches


def out_of_memory(message="no more memory"):
    """The error that says so."""
    if BACKEND == "tensorflow":
        return tf.errors.ResourceExhaustedError(None, None, message)
    if BACKEND == "jax":
        import jax

        return jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")
    import torch

    return torch.OutOfMemoryError(message)


def out_of_memory_in_a_step():
    """The error that the host raises in a step for it to say so."""
    # TensorFlow makes one of its own of this one only.
    is_tensorflow = BACKEND == "tensorflow"
    return MemoryError("no more memory") if is_tensorflow else out_of_memory()


def error_in_a_step(kind):
    """What becomes of an error of `kind` that the host raises in a step."""
    if BACKEND == "tensorflow":
        return tf.errors.OpError
    if BACKEND == "jax":
        import jax

        # What was called before raises the one, what is new the other.
        return jax.errors.JaxRuntimeError, ValueError
    return kind


def tells_late():
    """Whether an error in a step is told where a number is read.

    On a GPU JAX has gone on by then.
    """
    if BACKEND != "jax":
        return False
    import jax

    return jax.default_backend() != "cpu"


def needs_errors_at_once():
    """Leaves a test out where Keras hides them as it reads logs."""
    if tells_late():
        pytest.skip("jax: on a GPU errors are told late, and Keras hides them")


def attempts(sizes):
    """The sizes of micro-batches that were tried, one after the other.

    Where errors are told late, all micro-batches of a batch have run by then.
    """
    if not tells_late():
        return sizes
    return [size for size, _ in itertools.groupby(sizes)]


def error_in_the_data(kind):
    """What becomes of an error of `kind` that data for `fit` raises."""
    if BACKEND == "tensorflow":
        return kind, tf.errors.OpError
    return kind


def holds_memory(total):
    """Whether a sum takes memory for its numbers."""
    if BACKEND == "tensorflow":
        return keras.ops.size(total.read_value()) > 0
    if BACKEND == "jax":
        return total.value is not None
    return total.value is not None


def through(tensor, forward, backward):
    """The tensor, seen by functions of the host on its way and way back.

    Args:
        tensor: A tensor.
        forward: Function of an array that returns it, or raises.
        backward: The same, of the gradient.
    """
    return _THROUGH[BACKEND](tensor, forward, backward)


def _through_tensorflow(tensor, forward, backward):
    def seen(see, tensor):
        out = tf.py_function(lambda t: see(t.numpy()), [tensor], tensor.dtype)
        out.set_shape(tensor.shape)
        return out

    @tf.custom_gradient
    def both(tensor):
        return seen(forward, tensor), lambda g: seen(backward, g)

    return both(tensor)


def _through_jax(tensor, forward, backward):
    import jax

    def seen(see, tensor):
        shape = jax.ShapeDtypeStruct(tensor.shape, tensor.dtype)
        return jax.pure_callback(lambda t: see(np.asarray(t)), shape, tensor)

    both = jax.custom_vjp(lambda tensor: seen(forward, tensor))
    both.defvjp(
        lambda tensor: (seen(forward, tensor), None),
        lambda _, gradient: (seen(backward, gradient),),
    )
    return both(tensor)


def _through_torch(tensor, forward, backward):
    import torch

    if tensor.is_meta:
        # Keras builds the model.
        return tensor

    class Both(torch.autograd.Function):
        @staticmethod
        def forward(context, tensor):
            forward(tensor.detach().cpu().numpy())
            return tensor.clone()

        @staticmethod
        def backward(context, gradient):
            backward(gradient.detach().cpu().numpy())
            return gradient

    return Both.apply(tensor)


_THROUGH = {
    "tensorflow": _through_tensorflow,
    "jax": _through_jax,
    "torch": _through_torch,
}


def own_step(loss, has_variables=True):
    """A `train_step` of one's own, as Keras's guides write it.

    Args:
        loss: Function of targets and outputs that returns a scalar.
        has_variables: Whether `optimizer.apply` is given them.
    """

    def of_tensorflow(self, data):
        x, y, *_ = data
        with tf.GradientTape() as tape:
            value = loss(y, self(x, training=True))
        variables = self.trainable_variables
        gradients = tape.gradient(value, variables)
        self.optimizer.apply(gradients, *[variables][:has_variables])
        return {"own": value}

    def of_jax(self, state, data):
        import jax

        trainable, non_trainable, optimizer, metrics = state
        x, y, *_ = data

        def compute(trainable, non_trainable):
            y_pred, non_trainable = self.stateless_call(
                trainable, non_trainable, x, training=True
            )
            return loss(y, y_pred), non_trainable

        differentiate = jax.value_and_grad(compute, has_aux=True)
        (value, non_trainable), gradients = differentiate(
            trainable, non_trainable
        )
        trainable, optimizer = self.optimizer.stateless_apply(
            optimizer, gradients, trainable
        )
        return {"own": value}, (trainable, non_trainable, optimizer, metrics)

    def of_torch(self, data):
        import torch

        x, y, *_ = data
        self.zero_grad()
        value = loss(y, self(x, training=True))
        value.backward()
        variables = self.trainable_variables
        gradients = [v.value.grad for v in variables]
        with torch.no_grad():
            self.optimizer.apply(gradients, *[variables][:has_variables])
        return {"own": value}

    return {"tensorflow": of_tensorflow, "jax": of_jax, "torch": of_torch}[
        BACKEND
    ]

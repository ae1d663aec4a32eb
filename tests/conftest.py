"""Hypothesis profiles, the device, and a check that nothing stays patched."""

import contextlib
import gc
import os
import weakref

import hypothesis
import keras
import pytest
import tensorflow as tf

from kaccum.backend import engine
from kaccum.keras_private import compiled_loss
from kaccum.patches import SharedPatch
from kaccum.session import Session
from tests.backends import BACKEND
from tests.reference import split_the_processor

hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.register_profile(
    "thorough", deadline=None, max_examples=1000
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


# Before anything is computed.
split_the_processor()

engine()
# Of classes and modules, each made by the module that needs it.
SHARED_PATCHES = [p for p in gc.get_objects() if type(p) is SharedPatch]


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default=None,
        help="where to compute, as gpu:0 or cpu:0 (default: a GPU if any)",
    )


def pytest_report_header(config):
    device = config.getoption("--device") or engine().device_name()
    return f"kaccum computes on {device}, Keras on {BACKEND}"


@pytest.fixture(autouse=True, scope="session")
def device(request):
    """Computes everything on the chosen device, in full precision."""
    engine().use_full_precision()
    chosen = request.config.getoption("--device")
    if chosen is None and BACKEND == "tensorflow":
        gpus = tf.config.list_physical_devices("GPU")
        # The first of several parts of the processor.
        chosen = "gpu:0" if gpus else "cpu:0"
    with keras.device(chosen) if chosen else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def nothing_stays_patched(monkeypatch):
    """Fails a test that leaves a model, optimizer or loss patched."""
    sessions = weakref.WeakSet()
    take_over = Session.take_over

    def recorded(self, *args, **kwargs):
        sessions.add(self)
        return take_over(self, *args, **kwargs)

    monkeypatch.setattr(Session, "take_over", recorded)
    yield
    for session in sessions:
        assert not session.is_installed, "a model stayed patched"
        left = vars(session._optimizer).keys() & set(dir(keras.optimizers.SGD))
        assert not left, f"an optimizer stayed patched: {left}"
        loss = compiled_loss(session._model)
        assert loss is None or "call" not in vars(loss), "a loss stayed patched"
    for patch in SHARED_PATCHES:
        assert not patch.is_installed, f"{vars(patch)} stayed"
